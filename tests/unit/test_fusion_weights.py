"""Weights of 0 and 1 on a closed support: main with all of the weight is main, its tail included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fusion_cases import MAIN, TRIO, answers, assert_sound, dense, logits_of, mapped, space, weights_of
from torch import Tensor

from ensemble_core import factory  # noqa: F401  (registers all fusions)
from ensemble_core.fusion.base import FUSIONS, Fused, Fusion, FusionSpace, build_fusion
from ensemble_core.members.base import Candidates
from ensemble_core.transfer.matrix import TransferMatrix

POOLS: list[tuple[str, dict[str, Any]]] = [
    ("projection", {}),
    ("projection", {"pool": "log-linear"}),
    ("union", {}),
    ("gac", {"threshold": 0.3}),
    ("eva", {}),
    ("robust", {}),
    ("relative", {}),
    ("core", {"base": {"name": "projection"}}),
    ("core", {"base": {"name": "relative"}}),
]
NUM_ANCHORS = 200


def matrix(size: int, seed: int) -> TransferMatrix:
    """(V, 8) random rows; anchor a is everybody's token a."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(size, NUM_ANCHORS, generator=generator).topk(8, dim=1).indices.sort(dim=1).values
    values = torch.rand(size, 8, generator=generator) + 0.1
    rows = values / values.sum(dim=1, keepdim=True)
    return TransferMatrix(columns.int(), rows, torch.arange(NUM_ANCHORS))


def fusion(name: str, options: dict[str, Any]) -> Fusion:
    plain = space(TRIO)
    matrices = [matrix(len(vocabulary), i) for i, vocabulary in enumerate(TRIO)]
    with_matrices = FusionSpace(plain.vocabularies, lambda: matrices, plain.device, plain.members)
    return build_fusion(name, FUSIONS.parse(name, options, "fusion"), with_matrices)


def probabilities(fused: Fused, main: Candidates, logits: Tensor) -> Tensor:
    """(B, V): the tail is spread as main has it, over tokens that do not stand in the support."""
    own = logits.double().softmax(dim=1)
    outside = own.scatter(1, fused.token_ids, 0.0)
    share = fused.tail.double().exp() / main.tail.double().exp()
    return dense(fused, own.shape[1]).double() + outside * share.unsqueeze(1)


@pytest.mark.parametrize("top_k", [8, 48])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize(("name", "options"), POOLS)
def test_main_with_all_the_weight_is_main(
    name: str, options: dict[str, Any], sharpness: float, top_k: int
) -> None:
    """Every token of it, also those that it has no candidate for and another member has."""
    logits = logits_of(TRIO, 12, 1, sharpness)
    parts = answers(logits, top_k)
    fused = fusion(name, options).fuse(parts, torch.tensor([[1.0, 0.0, 0.0]]).expand(12, 3))
    found = probabilities(fused, parts[0], logits[0])
    torch.testing.assert_close(found.log(), logits[0].double().log_softmax(dim=1), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("top_k", [8, 48])
@pytest.mark.parametrize(("name", "options"), [case for case in POOLS if case[0] != "robust"])  # medians may be 0
def test_no_token_that_main_can_say_is_ruled_out(name: str, options: dict[str, Any], top_k: int) -> None:
    """Flat members, whose tails are large: what is supposed of named tokens leaves the others half of it."""
    logits = logits_of(TRIO, 12, 2, 0.3)
    parts, weights = answers(logits, top_k), weights_of(12, 3, 3)
    fused = fusion(name, options).fuse(parts, weights)
    assert_sound(fused)
    found = probabilities(fused, parts[0], logits[0])
    assert (found > 0).all()
    assert float(found.sum(dim=1).max()) < 1 + 1e-5
    if name in ("union", "relative"):  # where the tail is main's alone
        assert bool((fused.tail.exp() > 0.5 * parts[0].tail.exp() - 1e-6).all())


@pytest.mark.parametrize("member", [1, 2])
def test_an_assistant_with_all_the_weight_is_its_mapped_distribution(member: int) -> None:
    logits = logits_of(TRIO, 12, 4)
    parts, weights = answers(logits, 48), torch.eye(3)[member].expand(12, 3)
    found = dense(fusion("projection", {}).fuse(parts, weights), len(MAIN)).double()
    whole = torch.stack([mapped(logits, TRIO, row)[member] for row in range(12)])
    every = dense(fusion("projection", {}).fuse(answers(logits), weights), len(MAIN)).double()
    torch.testing.assert_close(every, whole, atol=1e-6, rtol=1e-4)
    # A candidate's place may hold more of its tokens; what candidates bring there is in it, and no less.
    least = parts[member].logprobs.double().exp()
    assert bool((found.sum(dim=1) > least.sum(dim=1) - 1e-5).all())
    sure = whole > 0.01
    assert int(sure.sum()) > 50
    torch.testing.assert_close(found[sure], whole[sure], atol=2e-3, rtol=0.05)


@pytest.mark.parametrize("name", ["projection", "relative"])
def test_a_member_without_weight_leaves_no_trace(name: str) -> None:
    """Whatever it says, the others alone decide; only how much is supposed of a token may shift a little."""
    logits = logits_of(TRIO, 12, 5)
    strategy, weights = fusion(name, {}), torch.tensor([[0.6, 0.4, 0.0]]).expand(12, 3)
    parts = answers(logits, 48)
    other = answers([logits[2].flip(1)], 48)[0]
    left = probabilities(strategy.fuse(parts, weights), parts[0], logits[0])
    right = probabilities(strategy.fuse([*parts[:2], other], weights), parts[0], logits[0])
    torch.testing.assert_close(left, right, atol=2e-3, rtol=0.0)

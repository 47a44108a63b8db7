"""Pools by the direct map against the dense formulas, and what must hold of every pool."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import byte_vocabulary
from fusion_cases import (
    FIRST,
    MAIN,
    SECOND,
    TRIO,
    answers,
    assert_sound,
    dense,
    logits_of,
    mapped,
    named,
    space,
    weights_of,
    with_control,
)
from torch import Tensor

from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from ensemble_core.members.candidates import top_candidates
from ensemble_core.text.vocabulary import Vocabulary

POOLS = ("linear", "log-linear")


def fusion(pool: str, vocabularies: tuple[Vocabulary, ...] = TRIO) -> ProjectionFusion:
    return ProjectionFusion(space(vocabularies), ProjectionOptions.model_validate({"pool": pool}))


def dense_pool(pool: str, views: Tensor, named_by: Tensor, weights: Tensor) -> Tensor:
    """(V_main,) from (M, V_main) distributions."""
    if pool == "linear":
        return weights @ views
    stood_in = torch.where(named_by, views, views[:1])
    product = (stood_in ** weights[:, None]).prod(dim=0)
    return product / product.sum()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("controls", [False, True])
def test_whole_distributions_give_the_dense_formula(pool: str, controls: bool) -> None:
    vocabularies = (MAIN, with_control(FIRST, b"<only here>"), SECOND) if controls else TRIO
    logits, weights = logits_of(vocabularies, 5, 1), weights_of(5, 3, 2)
    logits[1][0, -1] = 12.0
    fused = fusion(pool, vocabularies).fuse(answers(logits), weights)
    assert_sound(fused)
    assert fused.tail.tolist() == [-torch.inf] * 5
    found = dense(fused, len(MAIN))
    for row in range(5):
        views = mapped(logits, vocabularies, row)
        expected = dense_pool(pool, views, named(vocabularies), weights[row].double())
        torch.testing.assert_close(found[row], expected, atol=2e-6, rtol=1e-4)
    if controls:
        control = logits[1].softmax(dim=1)[:, -1]
        torch.testing.assert_close(fused.unmapped[:, 1], control)
        assert float(control[0]) > 0.5
        assert not fused.unmapped[:, [0, 2]].any()


@pytest.mark.parametrize("pool", POOLS)
def test_candidates_come_close_to_the_dense_formula(pool: str) -> None:
    """Members that mostly agree, as language models do."""
    shared = 4.0 * torch.randn(60, 256, generator=torch.Generator().manual_seed(1))
    logits, weights = logits_of(TRIO, 60, 3, 1.5), weights_of(60, 3, 4)
    for each in logits:
        each[:, :256] += shared
    whole = dense(fusion(pool).fuse(answers(logits), weights), len(MAIN))
    close = dense(fusion(pool).fuse(answers(logits, 64), weights), len(MAIN))
    variation = (whole - close).abs().sum(dim=1) / 2
    assert float(variation.mean()) < 0.01  # measured: linear 0.0016, log-linear 0.0037
    assert float((whole.argmax(dim=1) == close.argmax(dim=1)).float().mean()) == 1.0


@pytest.mark.parametrize("top_k", [8, 64, 10_000])
@pytest.mark.parametrize("pool", POOLS)
def test_mass_is_one_and_stands_once(pool: str, top_k: int) -> None:
    logits = logits_of(TRIO, 20, 5)
    logits[0][:4, 20:] = -torch.inf
    logits[1][2:6, :250] = -torch.inf
    for weights in (weights_of(20, 3, 6), torch.eye(3)[torch.arange(20) % 3]):
        assert_sound(fusion(pool).fuse(answers(logits, top_k), weights))


@pytest.mark.parametrize("top_k", [16, 10_000])
@pytest.mark.parametrize("pool", POOLS)
def test_identical_members_are_one(pool: str, top_k: int) -> None:
    (part,) = answers(logits_of([MAIN], 6, 7), top_k)
    expected = torch.zeros(6, len(MAIN)).scatter_(1, part.token_ids, part.logprobs.exp())
    for members in (1, 2, 3):
        fused = fusion(pool, (MAIN,) * members).fuse([part] * members, weights_of(6, members, 8))
        torch.testing.assert_close(dense(fused, len(MAIN)).float(), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(fused.tail.exp(), part.tail.exp(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_the_order_of_assistants_is_free(pool: str) -> None:
    parts, weights, swap = answers(logits_of(TRIO, 8, 9), 32), weights_of(8, 3, 10), [0, 2, 1]
    left = fusion(pool).fuse(parts, weights)
    right = fusion(pool, (MAIN, SECOND, FIRST)).fuse([parts[i] for i in swap], weights[:, swap])
    torch.testing.assert_close(dense(left, len(MAIN)), dense(right, len(MAIN)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("broken", [0, 1])
def test_rows_do_not_touch_each_other(pool: str, broken: int) -> None:
    logits, weights = logits_of(TRIO, 5, 11), weights_of(5, 3, 12)
    logits[broken][2, 7] = torch.nan
    parts, strategy = answers(logits, 24), fusion(pool)
    together = strategy.fuse(parts, weights)
    for row in range(5):
        alone = strategy.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], equal_nan=True)
        assert bool(together.logprobs[row].amax().isfinite()) == (row != 2)


def test_log_linear_keeps_words_that_an_assistant_cannot_say() -> None:
    """Main's " dea" is no token of the assistant's; a plain product would forbid it."""
    vocabularies = (MAIN, FIRST)
    logits = [torch.full((1, len(v)), -10.0) for v in vocabularies]
    logits[0][0, MAIN.tokens.index(b" dea")] = 5.0
    fused = fusion("log-linear", vocabularies).fuse(answers(logits), torch.tensor([[0.5, 0.5]]))
    assert MAIN.tokens[int(dense(fused, len(MAIN)).argmax())] == b" dea"


def test_members_that_agree_on_nothing_leave_it_to_main() -> None:
    logits = [torch.full((1, len(MAIN)), -torch.inf) for _ in range(2)]
    logits[0][0, 5], logits[1][0, 6] = 0.0, 0.0
    parts = answers(logits)
    fused = fusion("log-linear", (MAIN, MAIN)).fuse(parts, torch.tensor([[0.5, 0.5]]))
    assert int(dense(fused, len(MAIN)).argmax()) == 5
    assert_sound(fused)


MANY = (*TRIO, *(byte_vocabulary(words) for words in (("ab", "cde"), ("a b", "abcd"), ("dea",), ("bc", "aa"))))


@pytest.mark.parametrize("pool", POOLS)
def test_ten_members_are_pooled_by_the_dense_formula(pool: str) -> None:
    vocabularies = (*MANY, with_control(FIRST, b"<only here>"), SECOND, MAIN)
    logits, weights = logits_of(vocabularies, 4, 7), weights_of(4, 10, 8)
    found = dense(fusion(pool, vocabularies).fuse(answers(logits), weights), len(MAIN))
    for row in range(4):
        views = mapped(logits, vocabularies, row)
        expected = dense_pool(pool, views, named(vocabularies), weights[row].double())
        torch.testing.assert_close(found[row], expected, atol=2e-6, rtol=1e-4)


def test_a_token_far_below_the_floors_keeps_its_mass() -> None:
    """As a bias asks for: every member names it, so floors that are 10^15 times as large have no part in it."""
    logits = logits_of(TRIO, 3, 11)
    for each in logits:
        each[:, 122] = each.logsumexp(dim=1) - 40.0
    parts = [top_candidates(each, 24, [(122,)] * 3) for each in logits]
    fused, weights = fusion("linear").fuse(parts, torch.full((3, 3), 1 / 3)), 1 / 3
    for row in range(3):
        expected = sum(weights * float(each[row].double().softmax(dim=0)[122]) for each in logits)
        found = fused.logprobs[row][fused.token_ids[row] == 122].amax().item()
        assert found == pytest.approx(math.log(expected), abs=1e-4)

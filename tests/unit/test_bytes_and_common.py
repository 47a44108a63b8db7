"""The study of bytes and the common vocabulary on fake members: stretches, what is heard, splits, and the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeMember, byte_vocabulary, fake_config, pair_vocabulary
from fusion_cases import FIRST, MAIN, answers, assert_sound, dense, logits_of, mapped, space, weights_of

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation import collect
from ensemble_core.evaluation.collect import Collector
from ensemble_core.evaluation.offline import document_nats, fuse_positions, shared_positions
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.spelling import Document
from ensemble_core.fusion.base import Fusion
from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from studies.along_paths import BYTES, Listener, Reading, Space, common_path
from studies.byte_steps import Branches, Shares, alone, kinds, shares
from studies.covers import along, covered
from studies.reductions import Reduction, to_bytes
from studies.split_pool import SplitPool, piece_groups
from studies.stretches import fused_nats, shared_starts, stretches

TEXTS = ["abcde deab cab", "abab abé cde\n\nab", "dea 中 abc", "a dea dea dea cab abc abc abc"]
DOCUMENTS = [Document(text) for text in TEXTS]
NAMES = ("alpha", "beta")
WEIGHTS = (0.7, 0.3)
COMMON = byte_vocabulary(["ab", "de"])  # a common vocabulary of the two
Pair = dict[str, FakeMember]


def pair(second: Callable[[], Any] = pair_vocabulary, seed: int = 2) -> Pair:
    return {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, max_len=100, num_pages=100),
        "beta": FakeMember("beta", second(), seed=seed, max_len=100, num_pages=100),
    }


def model(members: Pair) -> Any:
    """As much of an LLM as listeners need."""
    return SimpleNamespace(members=members, encode=lambda name, text: members[name].vocabulary.encode(text))


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pair], Scores]:
    monkeypatch.setattr(collect, "resolve_folder", lambda member: tmp_path / "nothing")

    def made(members: Pair) -> Scores:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return Collector(fake_config(), NAMES, folder, 400, lambda: model(members)).collect(DOCUMENTS)

    return made


def linear(members: Pair, names: Sequence[str]) -> Fusion:
    return ProjectionFusion(
        space([members[name].vocabulary for name in names]), ProjectionOptions.model_validate({})
    )


def test_with_one_vocabulary_stretches_are_the_linear_pool(scored: Callable[[Pair], Scores]) -> None:
    members = pair(byte_vocabulary)
    scores = scored(members)
    found = stretches(scores, NAMES)
    recipe = Recipe("duo", NAMES, WEIGHTS, linear(members, NAMES), "projection")
    shared = shared_positions(scores, NAMES)
    pooled = document_nats(scores, "alpha", shared, fuse_positions(scores, recipe, shared, 400))
    assert bool((found.num_tokens == 1).all())
    torch.testing.assert_close(found.summed(found.nats(WEIGHTS)), pooled, rtol=1e-5, atol=1e-5)


def test_identical_members_are_one(scored: Callable[[Pair], Scores]) -> None:
    found = stretches(scored(pair(byte_vocabulary, seed=1)), NAMES)
    torch.testing.assert_close(found.nats(WEIGHTS), -found.logprobs[:, 0])


def test_stretches_hold_all_of_a_text_in_any_order_of_members(scored: Callable[[Pair], Scores]) -> None:
    scores = scored(pair())
    found, turned = stretches(scores, NAMES), stretches(scores, NAMES[::-1])
    for column, name in enumerate(NAMES):
        shared = shared_positions(scores, [name, *(other for other in NAMES if other != name)])
        part = scores.members[name]
        own = torch.zeros(len(scores), dtype=torch.float64)
        own.index_add_(0, part.document.long(), -part.logprob.double() * part.scored)
        torch.testing.assert_close(found.summed(-found.logprobs[:, column]), own)
        assert len(shared.rows) >= len(found.document)
    torch.testing.assert_close(found.nats(WEIGHTS), turned.nats(WEIGHTS[::-1]))
    torch.testing.assert_close(found.nats((1.0, 0.0)), -found.logprobs[:, 0])
    assert bool((found.best_nats() <= found.nats(WEIGHTS)).all())
    assert int((found.num_tokens > 1).any(dim=1).sum()) > 5, "a test of nothing: all stretches are single tokens"


def test_tuned_weights_cost_the_least(scored: Callable[[Pair], Scores]) -> None:
    found = stretches(scored(pair()), NAMES)
    best = float(found.nats(found.tuned()).sum())
    assert all(best <= float(found.nats((w / 50, 1 - w / 50)).sum()) + 1e-3 for w in range(51))


def test_what_a_fusion_costs_is_shared_out_among_stretches(scored: Callable[[Pair], Scores]) -> None:
    members = pair()
    scores = scored(members)
    for names in (NAMES, NAMES[::-1]):
        recipe = Recipe("duo", names, WEIGHTS, linear(members, names), "projection")
        shared = shared_positions(scores, names)
        fused = fuse_positions(scores, recipe, shared, 400)
        nats = fused_nats(scores, names[0], shared, fused, shared_starts(scores, names))
        summed = stretches(scores, names).summed(nats)
        torch.testing.assert_close(summed, document_nats(scores, names[0], shared, fused))


def to_strings(member: FakeMember) -> Reduction:
    """Every token as tokens of COMMON."""
    vocabulary = member.vocabulary
    spelt = [vocabulary.text_bytes(token_id) for token_id in range(len(vocabulary))]
    ids = {token: token_id for token_id, token in enumerate(COMMON.tokens)}
    return Reduction([tuple(_greedy(token, ids)) for token in spelt])


def _greedy(token: bytes, ids: dict[bytes, int]) -> list[int]:
    found, at = [], 0
    while at < len(token):
        size = next(size for size in (2, 1) if token[at : at + size] in ids)
        found.append(ids[token[at : at + size]])
        at += size
    return found


def listener(members: Pair, folder: Path) -> Listener:
    spaces = {
        BYTES: Space({name: to_bytes(member.vocabulary) for name, member in members.items()}, [1] * 256),
        "common": Space(
            {name: to_strings(member) for name, member in members.items()}, [len(t) for t in COMMON.tokens]
        ),
    }
    return Listener(NAMES, lambda: spaces, lambda: model(members), folder, "fakes")


@pytest.fixture
def heard(tmp_path: Path) -> tuple[Pair, list[Reading]]:
    members = pair()
    return members, listener(members, tmp_path).hear(DOCUMENTS, "test")


def test_what_was_heard_is_read_again_without_a_model(tmp_path: Path) -> None:
    members = pair()
    first = listener(members, tmp_path).hear(DOCUMENTS, "test")
    calls = sum(len(member.calls) for member in members.values())
    again = listener(members, tmp_path).hear(DOCUMENTS, "test")
    assert sum(len(member.calls) for member in members.values()) == calls
    assert all(member.is_empty for member in members.values())
    for left, right in zip(first, again, strict=True):
        assert (left.num_bytes, list(left.shared), dict(left.places)) == (
            right.num_bytes,
            right.shared,
            right.places,
        )
        assert left.spots.keys() == right.spots.keys()
        for key, spots in left.spots.items():
            pairs = zip(spots, right.spots[key], strict=True)
            assert all(a.start == b.start and np.array_equal(a.begun, b.begun) for a, b in pairs)


def test_carried_weights_are_the_mixture_of_stretches(
    heard: tuple[Pair, list[Reading]], scored: Callable[[Pair], Scores]
) -> None:
    members, readings = heard
    found = stretches(scored(members), NAMES)
    kept = shares(readings, NAMES, kinds(NAMES)[0])
    torch.testing.assert_close(kept.logs, found.logprobs, rtol=1e-4, atol=1e-4)
    bits = kept.bits(WEIGHTS, len(DOCUMENTS))
    torch.testing.assert_close(bits, found.summed(found.nats(WEIGHTS)) / math.log(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", kinds(NAMES), ids=lambda kind: kind[0])
def test_all_the_weight_on_one_member_is_this_member(heard: tuple[Pair, list[Reading]], kind: Any) -> None:
    """Steps of a member's own text multiply to its own likelihood, whatever the symbols are."""
    _, readings = heard
    for column, name in enumerate(NAMES):
        if kind[1] not in (BYTES, common_path(name)):
            continue  # it may leave the other's path
        bits = shares(readings, NAMES, kind).bits((1.0 - column, float(column)), len(DOCUMENTS))
        own = [-sum(spot.logprob for spot in reading.spots[name, BYTES]) / math.log(2) for reading in readings]
        torch.testing.assert_close(bits, torch.tensor(own, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_steps_are_sums_over_covers(heard: tuple[Pair, list[Reading]]) -> None:
    """The first byte of each stretch by one weight: against covers summed with the member's own forwards."""
    members, readings = heard
    logs = shares(readings[:1], NAMES, kinds(NAMES)[1]).logs
    reading, text = readings[0], TEXTS[0].encode()
    offset = len(text) - reading.num_bytes
    start, end = reading.shared[0], reading.shared[1]
    for column, name in enumerate(NAMES):
        vocabulary = members[name].vocabulary
        before = vocabulary.encode(text[: offset + start].decode())
        branches = Branches(members[name])
        own = vocabulary.encode(text[offset + start : offset + end].decode())
        found = [
            covered(
                lambda ids, b=branches, p=before: b([*p, *ids]),  # type: ignore[misc]
                to_bytes(vocabulary),
                tuple(text[offset + start : offset + stop]),
                along(own),
            ).begun
            for stop in range(start + 1, end)
        ]
        branches.close()
        assert members[name].is_empty
        expected = np.diff(np.log([1.0, *found]))
        torch.testing.assert_close(logs[: len(expected), column], torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_where_main_stands_within_a_stretch(heard: tuple[Pair, list[Reading]]) -> None:
    _, readings = heard
    rows = alone(readings, NAMES, WEIGHTS)
    assert [row["main"] for row in rows] == list(NAMES)
    share = {row["main"]: row["positions within a stretch, %"] for row in rows}
    assert float(str(share["alpha"])) > 20, "the member of bytes has places that the one of pairs has not"
    assert all(float(str(row["better of both"])) <= float(str(row["main alone"])) for row in rows)


def test_steps_that_nobody_gives_anything_do_not_count() -> None:
    logs = torch.tensor([[-1.0, -2.0], [-torch.inf, -0.5]], dtype=torch.float64)
    bits = Shares(logs, torch.tensor([0, 1])).bits((0.5, 0.5), 2)
    assert bits.tolist() == pytest.approx(
        [-math.log2(0.5 * math.exp(-1) + 0.5 * math.exp(-2)), -math.log2(0.5 * math.exp(-0.5))]
    )


def split(names: Sequence[Any] = (MAIN, FIRST)) -> SplitPool:
    main, assistant = names
    return SplitPool(space(names), piece_groups(main, assistant))


def test_a_split_pool_follows_its_formula() -> None:
    logits = logits_of((MAIN, FIRST), 6, seed=3)
    weights = weights_of(6, 2, seed=4)
    fused = split().fuse(answers(logits), weights)
    assert_sound(fused)
    groups = piece_groups(MAIN, FIRST)
    for row in range(6):
        own, other = mapped(logits, (MAIN, FIRST), row)
        expected = weights[row, 0] * own
        for group in groups.unique().tolist():
            inside = groups == group
            expected[inside] += weights[row, 1] * other[inside].sum() * own[inside] / own[inside].sum()
        torch.testing.assert_close(dense(fused, len(MAIN))[row], expected, rtol=1e-4, atol=1e-6)
    assert len(groups.unique()) < len(MAIN), "a test of nothing: every token stands alone"


def test_a_split_pool_of_one_vocabulary_is_the_linear_pool() -> None:
    logits, weights = logits_of((MAIN, MAIN), 4, seed=5), weights_of(4, 2, seed=6)
    pooled = ProjectionFusion(space((MAIN, MAIN)), ProjectionOptions.model_validate({}))
    left, right = (each.fuse(answers(logits), weights) for each in (split((MAIN, MAIN)), pooled))
    torch.testing.assert_close(dense(left, len(MAIN)), dense(right, len(MAIN)))


@pytest.mark.parametrize("top_k", [8, 10_000])
def test_a_split_pool_with_all_weight_on_main_is_main(top_k: int) -> None:
    logits = logits_of((MAIN, FIRST), 4, seed=7)
    fused = split().fuse(answers(logits, top_k), torch.tensor([[1.0, 0.0]]).expand(4, -1))
    assert_sound(fused)
    given = answers(logits, top_k)[0]
    own = torch.zeros(4, len(MAIN), dtype=torch.float64)
    own.scatter_add_(1, given.token_ids, given.logprobs.double().exp())
    named = own > 0
    torch.testing.assert_close(dense(fused, len(MAIN))[named], own[named], rtol=1e-4, atol=1e-6)


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    logits, weights = logits_of((MAIN, FIRST), 3, seed=8), weights_of(3, 2, seed=9)
    whole = dense(split().fuse(answers(logits), weights), len(MAIN))
    logits[1][1] = torch.nan
    broken = dense(split().fuse(answers(logits), weights), len(MAIN))
    torch.testing.assert_close(broken[[0, 2]], whole[[0, 2]])

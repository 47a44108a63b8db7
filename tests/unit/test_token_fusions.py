"""The fusions in main's vocabulary against slow dense formulas, row by row, and what must hold of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    slow_place,
    space,
    weights_of,
    with_control,
)
from torch import Tensor

from ensemble_core import factory  # noqa: F401  (registers all fusions)
from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FUSIONS, Fusion, build_fusion
from ensemble_core.fusion.robust import weighted_median
from ensemble_core.text.vocabulary import Vocabulary

ROLES = {"expert": "b", "base": "c"}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("union", {}),
    ("union", {"rest": "none", "top": 4}),
    ("gac", {}),
    ("gac", {"gate": "b", "threshold": 0.3}),
    ("eva", {}),
    ("eva", {"top": 1}),
    ("contrastive", ROLES),
    ("contrastive", {**ROLES, "alpha": 0.3, "main": "c", "base": "a"}),
    ("robust", {}),
)


def fusion(name: str, options: dict[str, Any], vocabularies: tuple[Vocabulary, ...] = TRIO) -> Fusion:
    return build_fusion(name, FUSIONS.parse(name, options, "fusion"), space(vocabularies))


def close_logits(rows: int, seed: int, vocabularies: tuple[Vocabulary, ...] = TRIO) -> list[Tensor]:
    """Members that agree in some rows and not in others; sharper down the batch."""
    shared = 3.0 * torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    logits = logits_of(vocabularies, rows, seed + 1, 2.0)
    for each in logits:
        each[:, :256] += shared
        each *= torch.linspace(0.5, 2.0, rows)[:, None]
    return logits


def union_formula(logits: list[Tensor], row: int, weights: Tensor, top: int = 10, rest: str = "main") -> Tensor:
    views, can = mapped(logits, TRIO, row), named(TRIO)
    union = sorted({i for view in views for i in view.topk(top).indices.tolist()})
    mixed = torch.zeros(len(MAIN), dtype=torch.float64)
    for member, vocabulary in enumerate(TRIO):
        own = logits[member][row].double().softmax(dim=0)
        firsts = {u: own[slow_place(u, MAIN, vocabulary)] for u in union}
        scores = torch.stack([views[member, u] if can[member, u] else firsts[u] for u in union])
        mixed[union] += weights[member] * scores / scores.sum()
    if rest == "none":
        return mixed
    outside = views[0].clone()
    outside[union] = 0.0
    return mixed * (1.0 - outside.sum()) + outside


def gac_formula(
    logits: list[Tensor], row: int, weights: Tensor, gate: str = "a", threshold: float = 0.5
) -> Tensor:
    views, member = mapped(logits, TRIO, row), "abc".index(gate)
    if float(logits[member][row].softmax(dim=0).max()) > threshold:
        return views[member]
    return weights @ views


def eva_formula(logits: list[Tensor], row: int, weights: Tensor, top: int = 3) -> Tensor:
    views = mapped(logits, TRIO, row)
    kept = []
    for i in range(3):
        others = [set(views[j].topk(top).indices.tolist()) for j in range(3) if j != i]
        kept.append(any(int(views[i].argmax()) in other for other in others))
    if not any(kept):
        return views[0]
    chosen = weights * torch.tensor(kept)
    return chosen @ views / chosen.sum()


def contrastive_formula(
    logits: list[Tensor], row: int, weights: Tensor, expert: str, base: str, main: str = "a", alpha: float = 1.0
) -> Tensor:
    views, can = mapped(logits, TRIO, row), named(TRIO)
    roles = ["abc".index(name) for name in (main, expert, base)]
    shares = [views[i].tolist() for i in roles]
    out = []
    for token, (start, plus, minus) in enumerate(zip(*shares, strict=True)):
        both = bool(can[roles[1], token] and can[roles[2], token])
        out.append(start * ((plus / minus) ** alpha if both else 1.0))
    found = torch.tensor(out, dtype=torch.float64)
    return found / found.sum()


def robust_formula(logits: list[Tensor], row: int, weights: Tensor) -> Tensor:
    medians = [slow_median(column.tolist(), weights.tolist()) for column in mapped(logits, TRIO, row).T]
    found = torch.tensor(medians, dtype=torch.float64)
    return found / found.sum()


def slow_median(values: list[float], weights: list[float]) -> float:
    """The mean of all that has at most half of the weight below and at most half above."""
    middle = [
        x
        for x in values
        if sum(w for y, w in zip(values, weights, strict=True) if y < x) <= 0.5 + 1e-6
        and sum(w for y, w in zip(values, weights, strict=True) if y > x) <= 0.5 + 1e-6
    ]
    return (min(middle) + max(middle)) / 2


FORMULAS = {
    "union": union_formula,
    "gac": gac_formula,
    "eva": eva_formula,
    "contrastive": contrastive_formula,
    "robust": robust_formula,
}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_distributions_give_the_dense_formula(name: str, options: dict[str, Any]) -> None:
    logits, weights = close_logits(16, 1), weights_of(16, 3, 2)
    fused = fusion(name, options).fuse(answers(logits), weights)
    assert_sound(fused)
    found, plain = dense(fused, len(MAIN)), []
    for row in range(16):
        expected = FORMULAS[name](logits, row, weights[row].double(), **options)  # type: ignore[operator]
        torch.testing.assert_close(found[row], expected, atol=5e-6, rtol=1e-3)
        plain.append(weights[row].double() @ mapped(logits, TRIO, row))
    assert float((found - torch.stack(plain)).abs().max()) > 1e-2  # it is not the linear pool


@pytest.mark.parametrize(("name", "options"), CASES)
def test_candidates_come_close_to_whole_distributions(name: str, options: dict[str, Any]) -> None:
    logits, weights, strategy = close_logits(60, 3), weights_of(60, 3, 4), fusion(name, options)
    whole = dense(strategy.fuse(answers(logits), weights), len(MAIN))
    close = dense(strategy.fuse(answers(logits, 96), weights), len(MAIN))
    variation = float(((whole - close).abs().sum(dim=1) / 2).mean())
    # Measured: others 0.005, contrastive 0.118: a ratio of guessed masses, here of members with nothing in common.
    assert variation < (0.15 if name == "contrastive" else 0.01)


@pytest.mark.parametrize("top_k", [8, 64, 10_000])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_mass_is_one_and_stands_once(name: str, options: dict[str, Any], top_k: int) -> None:
    """Also where tokens are forbidden, where a member only knows control tokens, and where only one has weight."""
    vocabularies = (MAIN, with_control(FIRST, b"<only here>"), SECOND)
    logits = logits_of(vocabularies, 24, 5)
    logits[0][:4, 20:] = -torch.inf
    logits[1][2:6, :250] = -torch.inf
    logits[1][8:12, -1] = 90.0
    logits[1][9, :-1] = -torch.inf
    strategy = fusion(name, options, vocabularies)
    for weights in (weights_of(24, 3, 6), torch.eye(3)[torch.arange(24) % 3]):
        assert_sound(strategy.fuse(answers(logits, top_k), weights))


@pytest.mark.parametrize("top_k", [16, 10_000])
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[1].get("rest") != "none"])
def test_identical_members_are_one(name: str, options: dict[str, Any], top_k: int) -> None:
    (part,) = answers(logits_of([MAIN], 6, 7), top_k)
    expected = torch.zeros(6, len(MAIN)).scatter_(1, part.token_ids, part.logprobs.exp())
    fused = fusion(name, options, (MAIN,) * 3).fuse([part] * 3, weights_of(6, 3, 8))
    torch.testing.assert_close(dense(fused, len(MAIN)).float(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(fused.tail.exp(), part.tail.exp(), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["union", "gac", "eva"])
def test_one_member_is_itself(name: str) -> None:
    (part,) = answers(logits_of([MAIN], 6, 9), 16)
    fused = fusion(name, {}, (MAIN,)).fuse([part], torch.ones(6, 1))
    expected = torch.zeros(6, len(MAIN)).scatter_(1, part.token_ids, part.logprobs.exp())
    torch.testing.assert_close(dense(fused, len(MAIN)).float(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in ("contrastive",)])
def test_the_order_of_assistants_is_free(name: str, options: dict[str, Any]) -> None:
    parts, weights, swap = answers(close_logits(8, 9), 32), weights_of(8, 3, 10), [0, 2, 1]
    moved = {**options, "gate": "c"} if "gate" in options else options
    left = fusion(name, options).fuse(parts, weights)
    right = fusion(name, moved, (MAIN, SECOND, FIRST)).fuse([parts[i] for i in swap], weights[:, swap])
    torch.testing.assert_close(dense(left, len(MAIN)), dense(right, len(MAIN)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_rows_do_not_touch_each_other(name: str, options: dict[str, Any]) -> None:
    logits, weights = close_logits(5, 11), weights_of(5, 3, 12)
    logits[0][2, 7] = torch.nan
    parts, strategy = answers(logits, 24), fusion(name, options)
    together = strategy.fuse(parts, weights)
    for row in (0, 1, 3, 4):
        alone = strategy.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row])
        assert bool(together.logprobs[row].amax().isfinite())


@pytest.mark.parametrize("top_k", [24, 200])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *CASES,
        ("projection", {}),
        ("projection", {"pool": "log-linear"}),
        ("core", {"base": {"name": "projection"}}),
        ("core", {"base": {"name": "union"}}),
    ],
)
def test_a_row_is_the_same_alone_and_in_a_batch_bit_for_bit(
    name: str, options: dict[str, Any], top_k: int
) -> None:
    vocabularies = TRIO if name == "contrastive" else (*TRIO, *TRIO[1:], *TRIO[1:], *TRIO[1:])
    rows, members = 6, len(vocabularies)
    parts, weights = answers(close_logits(rows, 14, vocabularies), top_k), weights_of(rows, members, 15)
    strategy = fusion(name, options, vocabularies)
    together = strategy.fuse(parts, weights)
    for row in range(rows):
        alone = strategy.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.tail[0], together.tail[row])


def test_the_gate_belongs_to_a_member() -> None:
    with pytest.raises(ConfigError, match=r"fusion.options.gate: 'z' is no member in use; allowed are \['a', 'b'"):
        fusion("gac", {"gate": "z"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"expert": "z", "base": "c"}, "fusion.options.expert: 'z'"),
        ({"expert": "b", "base": "z"}, "fusion.options.base: 'z'"),
        ({"expert": "b", "base": "c", "main": "z"}, "fusion.options.main: 'z'"),
        ({"expert": "b", "base": "a"}, r"members \['c'\] have no role"),
    ],
)
def test_roles_belong_to_members_and_members_to_roles(options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fusion("contrastive", options)


def test_alpha_zero_is_main() -> None:
    (main, *others) = answers(close_logits(4, 13), 24)
    fused = fusion("contrastive", {**ROLES, "alpha": 0.0}).fuse([main, *others], weights_of(4, 3, 1))
    assert_sound(fused)
    found = dense(fused, len(MAIN)).gather(1, main.token_ids)
    torch.testing.assert_close(found.float(), main.logprobs.exp(), atol=1e-6, rtol=1e-4)


def test_a_median_needs_three() -> None:
    with pytest.raises(ConfigError, match=r"three members or more, got \['a', 'b'\]"):
        fusion("robust", {}, (MAIN, FIRST))


@pytest.mark.parametrize("members", [3, 4, 5])
@pytest.mark.parametrize("equal", [False, True])
def test_the_weighted_median_is_the_slow_one(members: int, equal: bool) -> None:
    generator = torch.Generator().manual_seed(members)
    shares = torch.randint(0, 5, (6, members, 9), generator=generator) / 8.0
    weights = torch.full((6, members), 1 / members) if equal else weights_of(6, members, 3)
    found = weighted_median(shares, weights)
    for row in range(6):
        expected = [slow_median(shares[row, :, x].tolist(), weights[row].tolist()) for x in range(9)]
        torch.testing.assert_close(found[row], torch.tensor(expected))


def test_one_confident_stranger_does_not_carry_a_median_away() -> None:
    logits = [torch.full((1, len(v)), -8.0) for v in TRIO]
    for each in logits:
        each[0, [97, 98]] = torch.tensor([3.0, 2.0])
    logits[2][0, 122] = 30.0
    weights = torch.full((1, 3), 1 / 3)
    median = dense(fusion("robust", {}).fuse(answers(logits), weights), len(MAIN))
    mean = dense(fusion("gac", {"threshold": 1.0}).fuse(answers(logits), weights), len(MAIN))
    assert float(median[0, 122]) < 1e-3
    assert float(mean[0, 122]) > 0.3


def test_of_equals_the_lowest_ids_are_a_members_top() -> None:
    """All tokens are equals: 20 make the union; and every member's top token is in the others' top 20."""
    logits = [torch.zeros(2, len(vocabulary)) for vocabulary in (MAIN, MAIN, MAIN)]
    logits[0][:, 0] = 2.0
    weights = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, 3)
    union = fusion("union", {"rest": "none", "top": 20}, (MAIN, MAIN, MAIN)).fuse(answers(logits), weights)
    assert dense(union, len(MAIN)).nonzero()[:, 1].tolist() == list(range(20)) * 2
    kept = fusion("eva", {"top": 20}, (MAIN, MAIN, MAIN)).fuse(answers(logits), weights)
    pool = fusion("gac", {"threshold": 1.0}, (MAIN, MAIN, MAIN)).fuse(answers(logits), weights)
    assert torch.equal(dense(kept, len(MAIN)), dense(pool, len(MAIN)))

"""CoRE against its formula, dense and row by row, in token space and in relative space."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import exact_matrix
from fusion_cases import MAIN, TRIO, answers, assert_sound, dense, logits_of, mapped, space, weights_of
from torch import Tensor

from ensemble_core import factory  # noqa: F401  (registers all fusions)
from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FUSIONS, Fusion, FusionSpace, build_fusion
from ensemble_core.fusion.consistency import held
from ensemble_core.transfer.matrix import common_anchors

LINEAR = {"base": {"name": "projection"}}
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"level": "token"},
    {"level": "model"},
    {"function": "linear"},
    {"function": "power", "level": "token"},
    {"function": "reciprocal"},
    {"beta": 5.0},
    {"mode": "entropy-only"},
    {"mode": "entropy-only", "main_share": 0.0},
    {"main_share": 0.0},
    {"main_share": 0.9, "level": "token"},
)


def relative_space() -> FusionSpace:
    anchors = common_anchors(TRIO)
    matrices = [exact_matrix(vocabulary, anchors) for vocabulary in TRIO]
    return FusionSpace(TRIO, lambda: matrices, torch.device("cpu"), ("a", "b", "c"))


def core(base: str = "projection", options: dict[str, Any] | None = None, **own: Any) -> Fusion:
    chosen = {"base": {"name": base, "options": options or {}}, **own}
    where = relative_space() if base == "relative" else space(TRIO)
    return build_fusion("core", FUSIONS.parse("core", chosen, "fusion"), where)


def slow_core(
    views: Tensor,
    weights: list[float],
    *,
    mode: str = "filtered",
    level: str = "both",
    function: str = "rbf",
    beta: float = 2.0,
    main_share: float = 0.5,
) -> Tensor:
    """(X,) from (M, X), number by number."""
    functions: dict[str, Callable[[float], float]] = {
        "rbf": lambda d: (math.exp(-beta * d) - math.exp(-beta)) / (1 - math.exp(-beta)),
        "linear": lambda d: 1 - d,
        "power": lambda d: (1 - d) ** 5,
        "reciprocal": lambda d: 1 / (1 + d),
    }
    rows = views.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    quality, kept = [], []
    for i, row in enumerate(rows):
        s = [functions[function](abs(p - q)) for p, q in zip(row, mean, strict=True)]
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        if mode == "entropy-only":
            quality.append(1 / entropy)
            kept.append(row)
            continue
        quality.append(sum(s) / entropy if level != "token" else 1.0)
        kept.append([p * t for p, t in zip(row, s, strict=True)] if i and level != "model" else row)
    shares = [w * m for w, m in zip(weights, quality, strict=True)]
    shares = [share / sum(shares) for share in shares]
    if shares[0] < main_share:
        others = sum(shares[1:])
        shares = [main_share, *((1 - main_share) * share / others for share in shares[1:])]
    pooled = [sum(m * row[x] for m, row in zip(shares, kept, strict=True)) for x in range(len(mean))]
    return torch.tensor(pooled, dtype=torch.float64) / sum(pooled)


@pytest.mark.parametrize("options", CASES)
def test_whole_distributions_give_the_dense_formula(options: dict[str, Any]) -> None:
    logits, weights = logits_of(TRIO, 6, 1), weights_of(6, 3, 2)
    fused = core(**options).fuse(answers(logits), weights)
    assert_sound(fused)
    found, plain = dense(fused, len(MAIN)), []
    for row in range(6):
        views = mapped(logits, TRIO, row)
        plain.append(weights[row].double() @ views)
        expected = slow_core(views, weights[row].tolist(), **options)
        torch.testing.assert_close(found[row], expected, atol=5e-6, rtol=1e-3)
    assert float((found - torch.stack(plain)).abs().max()) > 1e-2


@pytest.mark.parametrize("options", CASES)
def test_in_relative_space_it_acts_on_projections(options: dict[str, Any]) -> None:
    """With one-hot rows and one step of em the result's projection is the consistent r itself."""
    logits, weights = logits_of(TRIO, 4, 3), weights_of(4, 3, 4)
    matrices = relative_space().matrices()
    full = [torch.zeros(len(v), m.num_anchors) for v, m in zip(TRIO, matrices, strict=True)]
    for dense_rows, matrix in zip(full, matrices, strict=True):
        dense_rows.scatter_(1, matrix.columns.long(), matrix.values)
    fused = core("relative", {"support": "full", "steps": 1}, **options).fuse(answers(logits), weights)
    found = dense(fused, len(MAIN)) @ full[0].double()
    for row in range(4):
        views = [
            each[row].double().softmax(dim=0) @ rows.double() for each, rows in zip(logits, full, strict=True)
        ]
        expected = slow_core(torch.stack(views), weights[row].tolist(), **options)
        torch.testing.assert_close(found[row], expected, atol=5e-6, rtol=1e-3)


@pytest.mark.parametrize("base", ["projection", "union", "gac", "eva", "relative"])
def test_candidates_over_every_base(base: str) -> None:
    """Mass is one, rows are alone, and identical evidence of members stays what it is."""
    logits, weights, strategy = logits_of(TRIO, 8, 5), weights_of(8, 3, 6), core(base)
    parts = answers(logits, 40)
    fused = strategy.fuse(parts, weights)
    assert_sound(fused)
    together = dense(fused, len(MAIN))
    for row in range(8):
        alone = strategy.fuse([part.rows([row]) for part in parts], weights[row : row + 1])
        torch.testing.assert_close(dense(alone, len(MAIN))[0], together[row], atol=1e-6, rtol=1e-4)
    only_main = torch.tensor([[1.0, 0.0, 0.0]]).expand(8, 3)
    left = dense(strategy.fuse(parts, only_main), len(MAIN))
    right = torch.zeros(8, len(MAIN)).scatter_(1, parts[0].token_ids, parts[0].logprobs.exp())
    torch.testing.assert_close(left.gather(1, parts[0].token_ids).float(), right.gather(1, parts[0].token_ids))


def test_candidates_come_close_to_whole_distributions() -> None:
    shared = 3.0 * torch.randn(60, 256, generator=torch.Generator().manual_seed(2))
    logits, weights, strategy = logits_of(TRIO, 60, 7, 2.0), weights_of(60, 3, 8), core()
    for each in logits:
        each[:, :256] += shared
    whole = dense(strategy.fuse(answers(logits), weights), len(MAIN))
    close = dense(strategy.fuse(answers(logits, 96), weights), len(MAIN))
    assert float(((whole - close).abs().sum(dim=1) / 2).mean()) < 0.01  # measured: 0.0036


def test_the_order_of_assistants_is_free() -> None:
    parts, weights, swap = answers(logits_of(TRIO, 6, 9), 32), weights_of(6, 3, 10), [0, 2, 1]
    options = FUSIONS.parse("core", LINEAR, "fusion")
    left = build_fusion("core", options, space(TRIO)).fuse(parts, weights)
    moved = space([TRIO[i] for i in swap])
    right = build_fusion("core", options, moved).fuse([parts[i] for i in swap], weights[:, swap])
    torch.testing.assert_close(dense(left, len(MAIN)), dense(right, len(MAIN)), atol=1e-6, rtol=1e-5)


def test_members_that_a_gate_shut_out_stay_out() -> None:
    """An open gate of an assistant leaves nothing for main to hold, and its own answer is consistent with itself."""
    logits = logits_of(TRIO, 3, 11)
    logits[1][1, 50] = 40.0
    fused = core("gac", {"gate": "b", "threshold": 0.999}).fuse(answers(logits), weights_of(3, 3, 12))
    assert float(dense(fused, len(MAIN))[1, 50]) > 0.999


def test_members_that_contradict_each_other_wholly_leave_it_to_main() -> None:
    logits = [torch.full((1, len(v)), -torch.inf) for v in TRIO]
    for member, each in enumerate(logits):
        each[0, 97 + member] = 0.0
    fused = core().fuse(answers(logits), torch.full((1, 3), 1 / 3))
    assert_sound(fused)
    assert int(dense(fused, len(MAIN)).argmax()) == 97


def test_main_holds_its_share() -> None:
    weights = torch.tensor([[0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    expected = torch.tensor([[0.5, 1 / 3, 1 / 6], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(held(3.0 * weights, 0.5), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": {"name": "contrastive", "options": {"expert": "b", "base": "c"}}}, "allowed are .*'projection'"),
        ({"base": {"name": "robust"}}, "robust with {} has no linear pool; allowed are"),
        ({"base": {"name": "core", "options": LINEAR}}, "core with .* has no linear pool"),
        ({"base": {"name": "projection", "options": {"pool": "log-linear"}}}, "has no linear pool"),
        ({"base": {"name": "magic"}}, "unknown fusion 'magic'"),
        ({"base": {"name": "eva", "options": {"top": 0}}}, "base.options.top"),
        ({**LINEAR, "mode": "entropy-only", "level": "token"}, "options.level: .*no meaning in mode entropy-only"),
        ({**LINEAR, "mode": "entropy-only", "beta": 1.0}, "options.beta: .*no meaning in mode entropy-only"),
        ({**LINEAR, "function": "linear", "beta": 1.0}, "options.beta: .*belongs to function rbf"),
        ({}, "options.base: Field required"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FUSIONS.parse("core", options, "ensembles.duo.fusion")


def test_equal_bases_are_equal_however_they_are_worded() -> None:
    """Requests with equal options are fused in one batch."""
    plain = FUSIONS.parse("core", {"base": {"name": "gac"}}, "fusion")
    assert plain == FUSIONS.parse(
        "core", {"base": {"name": "gac", "options": {"threshold": 0.5, "gate": None}}}, "x"
    )
    assert plain != FUSIONS.parse("core", {"base": {"name": "gac", "options": {"threshold": 0.4}}}, "x")

"""The arithmetic of the two benchmarks of fusions, on tiny stored scores: positions, tuning, intervals, rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from benchmarks.ledger import Findings, has_marks
from benchmarks.runner import fill
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.scores import MemberScores, Scores
from ensemble_core.fusion.base import Fused
from ensemble_core.members.base import Candidates, log_rest
from studies import fusion_table, relative_sweep
from studies.__main__ import WORTH
from studies.fusion_table import Entry, Figures, paired, where_gained
from studies.halves import over_grid, over_simplex, positions
from studies.positions import PARTS
from studies.relative_sweep import Point, difference, points

SIZE, NUM = 6, 40  # tokens, positions
RECIPE = Recipe("duo", ("alpha", "beta"), (0.5, 0.5), None, "plain")


@dataclass(frozen=True, slots=True)
class PlainPool:
    """A linear pool of whole distributions over one vocabulary."""

    name: str = "plain"
    full_vocabulary: bool = False

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        dense = torch.stack([whole(part) for part in candidates], dim=1)
        pooled = torch.einsum("bm,bmv->bv", weights, dense)
        ids = torch.arange(SIZE).expand(len(pooled), -1)
        return Fused(ids, pooled.log(), torch.full((len(pooled),), -math.inf), torch.zeros(len(pooled), 2))


def whole(part: Candidates) -> Tensor:
    return torch.zeros(len(part.tail), SIZE).scatter_(1, part.token_ids, part.logprobs.exp())


def member(seed: int, num: int = SIZE) -> tuple[MemberScores, Tensor]:
    """Random answers at all positions of four documents; every fifth row is not scored."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = (2 * torch.randn(NUM, SIZE, generator=generator)).log_softmax(dim=1)
    best = logprobs.topk(num, dim=1)
    truth = torch.arange(NUM) % SIZE
    part = MemberScores(
        document=(torch.arange(NUM) // 10).int(),
        rest=(NUM - torch.arange(NUM)).int(),
        token=truth.int(),
        logprob=logprobs.gather(1, truth.unsqueeze(1)).squeeze(1),
        scored=torch.arange(NUM) % 5 != 0,
        slot=torch.arange(NUM).int(),
        candidates=Candidates(best.indices, best.values, log_rest(best.values)),
    )
    return part, logprobs


@pytest.fixture
def scores() -> Scores:
    return Scores(torch.full((4,), 30), {"alpha": member(1)[0], "beta": member(2)[0]})


def pool() -> Recipe:
    return replace(RECIPE, fusion=PlainPool())


def test_positions_are_the_scored_ones_evenly_spread(scores: Scores) -> None:
    everything = positions(scores, RECIPE.members, SIZE)
    assert everything.shared.rows.tolist() == [row for row in range(NUM) if row % 5]
    some = positions(scores, RECIPE.members, SIZE, 4)
    assert some.shared.rows.tolist() == [1, 13, 26, 39]
    assert all(torch.equal(slots, some.shared.rows.int()) for slots in some.shared.slots)
    assert some.documents.tolist() == [0, 1, 2, 3]


def test_nats_are_those_of_the_pool(scores: Scores) -> None:
    seen = positions(scores, RECIPE.members, SIZE)
    rows = seen.shared.rows
    dense = [member(seed)[1].exp()[rows, rows % SIZE] for seed in (1, 2)]
    for share in (1.0, 0.3):
        expected = -(share * dense[0] + (1 - share) * dense[1]).log()
        found = seen.nats(replace(pool(), weights=(share, 1 - share)))
        torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.main_nats.float(), -dense[0].log())


def test_tuning_finds_the_least(scores: Scores) -> None:
    seen = positions(scores, RECIPE.members, SIZE)

    def mean(share: float) -> float:
        return float(seen.nats(replace(pool(), weights=(share, 1 - share))).mean())

    least = min(range(101), key=lambda step: mean(step / 100)) / 100
    assert seen.tuned(pool(), over_simplex((0.5, 0.5))).weights[0] == pytest.approx(least, abs=0.02)
    grid = (0.9, 0.5, 0.2)
    assert seen.tuned(pool(), over_grid(grid)).weights[0] == min(grid, key=mean)


def test_gains_are_split_by_where_the_true_token_stands() -> None:
    few = Scores(torch.full((4,), 30), {"alpha": member(1, 2)[0], "beta": member(2, 2)[0]})
    seen = positions(few, RECIPE.members, 2)
    change = torch.arange(len(seen.shared.rows)).double()
    found = where_gained(seen, seen.main_nats + change, torch.arange(SIZE))
    parts = [str(value) for value in found.values()]
    shares = [float(part.split("(")[1].split("%")[0]) for part in parts[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert min(shares) > 0
    assert sum(float(part.split()[0]) for part in parts[1:]) == pytest.approx(float(parts[0]), abs=2e-4)
    rows = seen.shared.rows.tolist()
    own = [row % SIZE in few.members["alpha"].candidates.token_ids[row].tolist() for row in rows]
    expected = sum(float(c) for c, inside in zip(change, own, strict=True) if inside) / len(rows)
    assert float(parts[1].split()[0]) == pytest.approx(expected, abs=1e-4)


def test_a_difference_draws_documents(scores: Scores) -> None:
    """A shift that is the same everywhere has no spread; one of a single document has."""
    seen = positions(scores, RECIPE.members, SIZE)
    shifted = difference(seen, seen.main_nats - 0.25, seen.main_nats)
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((-0.25, -0.25, -0.25))
    lopsided = seen.main_nats - (seen.documents == 2).double()
    found = difference(seen, lopsided, seen.main_nats)
    assert found.value == pytest.approx(-0.25)
    assert found.low < -0.25 < found.high <= 0.0


def test_models_are_paired_over_documents() -> None:
    here = {"t": {i: {"bits": 10.0 * i + 5, "num_bytes": 10.0} for i in range(6)}}
    there = {"t": {i: {"bits": 10.0 * i + 7, "num_bytes": 10.0} for i in range(6)}}
    found = paired(here, there)
    assert (found.value, found.low, found.high) == pytest.approx((-0.2, -0.2, -0.2))


class Kept:
    """A table that has everything."""

    def __init__(self, bits: dict[str, float]) -> None:
        self._bits = bits

    def items(self, entry: Entry) -> dict[str, dict[int, dict[str, float]]]:
        own = self._bits[entry.label]
        rows = {i: {"bits": own * (10 + i), "num_bytes": 10.0 + i, "correct": float(i % 2)} for i in range(8)}
        return {"arc": rows, "nq": rows}


def figures(bits: dict[str, float]) -> Figures:
    entries = [
        Entry(
            label,
            label.rpartition(": ")[2],
            RECIPE if ":" in label else Recipe(label, (label,), (1.0,), None, "single"),
        )
        for label in bits
    ]
    return Figures.of(Kept(bits), entries)  # type: ignore[arg-type]


def test_rows_stand_against_the_best_member() -> None:
    found = figures({"alpha": 1.0, "beta": 1.25, "duo: union": 0.96})
    rows = found.main_rows()
    assert [row["%"] for row in rows] == ["+0.00", "+25.00", "-4.00"]
    assert rows[0]["against the best member"] == "-"
    assert rows[2]["against the best member"] == "-0.0400 (-0.0400 .. -0.0400)"
    assert [row["weight of main"] for row in rows] == [None, None, 0.5]
    assert found.task_rows()[2]["nq"] == "-4.00"
    assert [check.figure for check in found.checks()] == pytest.approx([4.0, -0.04])
    assert all(check.met for check in found.checks())


def test_an_ensemble_that_is_behind_does_not_meet_the_bound() -> None:
    found = figures({"alpha": 1.0, "beta": 1.25, "duo: union": 1.01})
    assert [check.met for check in found.checks()] == [False, False]


def test_points_have_names_of_their_own() -> None:
    every = [point for table in points().values() for point in table]
    assert len({point.label for point in every}) == len(set(every))
    assert Point(solver="search", steps=5, eta=0.5).options == {"solver": "search", "steps": 5, "eta": 0.5}
    assert Point().options == {"solver": "em", "steps": 3}


def test_every_sweep_weight_lies_in_the_simplex() -> None:
    assert all(0 < weight < 1 for weights in relative_sweep.WEIGHTS.values() for weight in weights)
    assert fusion_table.RELATIVE in fusion_table.VARIANTS
    assert fusion_table.PROJECTION in fusion_table.VARIANTS


def test_the_document_of_studies_has_a_place_for_every_table() -> None:
    asked, ways = ("questions", "prose"), ("greedy", "sampled")
    whole = [
        f"{kind}, {way}{tail}" for kind in asked for way in ways for tail in ("", ", against the best member")
    ]
    whole += [f"questions, {figure} by kind" for figure in ("exact match, %", "end in a loop, %")]
    whole += [f"prose, {figure} by kind" for figure in ("non-words, %", "distinct 4-grams, %", "end in a loop, %")]
    titles = {
        "fusion_table": ["fusions", "by task", "against projection", "places", "builder"],
        "relative_sweep": ["baseline", *points()],
        "trained_pair": ["models"],
        "unlike_vocabularies": ["pairs", "fusions", "served"],
        "repetition_penalty": ["members", "constants", "rules", "mean"],
        "positions": list(PARTS),
        "bytes_and_common": ["pools", "kinds", "steps", "alone", "covers"],
        "gate": ["gates"],
        "whole_answers": whole,
        "routing": ["routers", "bits"],
        "votes": ["arc", "gsm8k"],
    }
    rows = [{"what": "a", "figure": 12.25}]
    records = {name: Findings(name, dict.fromkeys(found, rows)).record() for name, found in titles.items()}
    assert tuple(records) == WORTH.names
    page = WORTH.page.read_text()
    apart = [
        f"{name}: {title}"
        for name in titles.keys() - {"trained_pair", "repetition_penalty", "gate", "routing", "votes"}
        for title in titles[name]
    ]
    assert all(has_marks(page, mark) for mark in apart)
    assert fill(page, records).count("| a | 12.2 |") == sum(map(len, titles.values()))

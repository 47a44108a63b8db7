"""Finds an ensemble's weights and fusion options together, by particle swarm: `unisono tune --method swarm`.

After Model Swarms (Feng et al. 2024, arXiv 2410.11163), over weights and options in place of parameters. What is
minimised is the negative log-likelihood of stored scores, so no model runs. Random search over as many points stands
beside it, and the recipe as configured is a candidate, so the result is never worse on what it was fitted on. Does
not know the command line or YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.likelihood import Likelihood
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.offline import SharedPositions, shared_positions
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.tune import NUM_POSITIONS, Tuned, judged, rounded, stored
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.weights import Weights
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.swarm import BestPoint, random_search, swarm_search, uniform

_RANGE = re.compile(r"^(?P<name>\w+)=(?P<low>-?[\d.]+)\.\.(?P<high>-?[\d.]+)$")
_BATCH = 10  # points that random search draws at a time


@dataclass(frozen=True, slots=True)
class OptionRange:
    """A fusion option that is searched for. whole: its values are integers."""

    name: str
    low: float
    high: float
    whole: bool

    def at(self, place: float) -> float | int:
        """The value at a place from 0 to 1."""
        value = self.low + place * (self.high - self.low)
        return round(value) if self.whole else float(f"{value:.3g}")


def parse_range(spec: str) -> OptionRange:
    """Read `NAME=LOW..HIGH`; numbers without a point mean integers. Raises EvaluationError."""
    match = _RANGE.match(spec)
    try:
        assert match is not None
        low, high = float(match["low"]), float(match["high"])
        assert low < high
    except (AssertionError, ValueError):
        raise EvaluationError(f"--vary {spec!r}: write NAME=LOW..HIGH, for example alpha=0.2..3.0") from None
    return OptionRange(match["name"], low, high, "." not in match["low"] + match["high"])


@dataclass(frozen=True, slots=True)
class TunedTogether:
    """tuned: the weights and what they are worth. options: of the fusion, those that were varied.

    nats: at the positions that were fitted on, as configured, found by the swarm, found by chance.
    """

    tuned: Tuned
    options: Mapping[str, float | int]
    nats: tuple[float, float, float]
    num_points: int


@dataclass(frozen=True, slots=True)
class _Cube:
    """The unit cube as weights and options. Weights are multiples of 0.01, so that near points are one."""

    bench: Workbench
    variant: Variant
    num_members: int
    ranges: Sequence[OptionRange]

    @property
    def num_dimensions(self) -> int:
        return self.num_members + len(self.ranges)

    def weights(self, point: Tensor) -> Weights:
        shares = point[: self.num_members]
        total = float(shares.sum())
        equal = torch.full_like(shares, 1 / self.num_members)
        return rounded(tuple((shares / total if total else equal).mul(100).round().div(100).tolist()))

    def options(self, point: Tensor) -> dict[str, float | int]:
        places = point[self.num_members :].tolist()
        return {each.name: each.at(place) for each, place in zip(self.ranges, places, strict=True)}

    def key(self, point: Tensor) -> tuple[object, ...]:
        return (self.weights(point), *self.options(point).values())

    def recipe(self, point: Tensor) -> Recipe:
        return replace(self.with_options(self.options(point)), weights=self.weights(point))

    def with_options(self, options: Mapping[str, float | int]) -> Recipe:
        """Raises InvalidRequestError for an option that the fusion does not take."""
        overrides = self.variant.overrides
        base = overrides.fusion_options
        if base is None and overrides.fusion is None:
            base = self.bench.config.ensembles[self.variant.model].fusion.options
        merged = replace(overrides, fusion_options={**(base or {}), **options}) if options else overrides
        return self.bench.recipe(replace(self.variant, overrides=merged))


@dataclass(frozen=True, slots=True)
class SwarmSearch:
    """How to search. vary: `NAME=LOW..HIGH`. budget: points that the swarm asks the likelihood of."""

    vary: tuple[str, ...] = ()
    num_positions: int = NUM_POSITIONS
    budget: int = 100
    seed: int = 0


def tune_by_swarm(
    bench: Workbench,
    variant: Variant,
    tasks: Sequence[Task],
    selection: Selection,
    search: SwarmSearch,
) -> TunedTogether:
    """Search for weights and options on one half, report on the other.

    Raises EvaluationError for a
    single member and for tasks without shared positions, InvalidRequestError for options that do not exist.
    """
    recipe = bench.recipe(variant)
    if len(recipe.members) < 2:
        raise EvaluationError(f"--ensemble {variant.label!r}: a member alone has no weights; name an ensemble")
    cube = _Cube(bench, variant, len(recipe.members), [parse_range(spec) for spec in search.vary])
    for each in cube.ranges:
        for place in (0.0, 1.0):
            cube.with_options({each.name: each.at(place)})
    scores = stored(bench, recipe, tasks, selection)
    shared = shared_positions(scores, recipe.members).spread(search.num_positions)
    if not len(shared.rows):
        raise EvaluationError(f"{', '.join(recipe.members)}: the tasks have no shared position")
    found, chance, before = _searched(cube, recipe, scores, shared, search)
    best = max(found, chance, key=lambda each: each.value)
    after = cube.recipe(best.point) if best.value > before else recipe
    options = cube.options(best.point) if best.value > before else {}
    tuned = Tuned(
        recipe.members,
        recipe.weights,
        after.weights,
        judged(bench, recipe, after, tasks, selection.other()),
        held_out=selection.split != "all",
    )
    return TunedTogether(tuned, options, (-before, -found.value, -chance.value), found.num_evaluations)


def _searched(
    cube: _Cube, recipe: Recipe, scores: Scores, shared: SharedPositions, search: SwarmSearch
) -> tuple[BestPoint, BestPoint, float]:
    """The swarm's best point, that of random search, and minus the nats of the recipe as it is."""
    with tqdm(desc="tuning", unit="position", unit_scale=True, disable=None) as bar:

        def value(each: Recipe) -> float:
            return -Likelihood(scores, each, shared, cube.bench.num_candidates, bar.update).nats(each.weights)

        def values(points: Tensor) -> Tensor:
            return torch.tensor([value(cube.recipe(point)) for point in points], dtype=torch.float64)

        size = cube.num_dimensions
        found = swarm_search(values, size, search.budget, search.seed, cube.key)
        drawn = partial(uniform, _BATCH, size)
        chance = random_search(values, drawn, cube.key, found.num_evaluations, search.seed)
        return found, chance, value(recipe)


def told_together(found: TunedTogether) -> str:
    """How the search went, and the options it found as YAML."""
    before, swarm, chance = found.nats
    lines = [
        f"nats per shared position: {before:.5f} as configured, {swarm:.5f} by a swarm over {found.num_points} "
        f"points, {chance:.5f} by as many random ones"
    ]
    if found.options:
        inner = ", ".join(f"{name}: {value:g}" for name, value in found.options.items())
        lines.append(f"fusion options: {{{inner}}}")
    return "\n".join(lines)

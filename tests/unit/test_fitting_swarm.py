"""The swarm against what any maximiser must hold, whatever it maximises."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable
from typing import Literal

import pytest
import torch
from torch import Tensor

from ensemble_core.fitting.swarm import (
    BestPoint,
    Evaluate,
    SwarmOptions,
    random_search,
    swarm_search,
    uniform,
)

BOTTOM = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64)


def bowl(points: Tensor) -> Tensor:
    return -(points - BOTTOM).square().sum(dim=1)


class Watched:
    """An objective that remembers what it was asked."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.points: list[Tensor] = []

    def __call__(self, points: Tensor) -> Tensor:
        self.points += list(points)
        return self.evaluate(points)


def cell(point: Tensor) -> Hashable:
    """Quarters of each side: 64 cells in three dimensions."""
    return tuple((point * 4).long().clamp(max=3).tolist())


def by_chance(evaluate: Evaluate, max_evaluations: int, seed: int = 0) -> BestPoint:
    return random_search(evaluate, functools.partial(uniform, 7, 3), cell, max_evaluations, seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_bottom_of_a_bowl_is_found(seed: int) -> None:
    found = swarm_search(bowl, 3, 5000, seed)
    assert found.point.dtype == torch.float64
    assert float((found.point - BOTTOM).abs().max()) < 1e-2
    assert found.value == pytest.approx(float(bowl(found.point[None])))


@pytest.mark.parametrize("restart", ["random", "best"])
def test_every_point_lies_in_the_cube(restart: Literal["random", "best"]) -> None:
    watched = Watched(bowl)
    swarm_search(watched, 3, 600, 0, options=SwarmOptions(patience=2, restart=restart))
    points = torch.stack(watched.points)
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1


@pytest.mark.parametrize("restart", ["random", "best"])
def test_the_best_value_never_falls(restart: Literal["random", "best"]) -> None:
    found = swarm_search(bowl, 3, 400, 1, options=SwarmOptions(patience=2, restart=restart))
    assert all(before <= after for before, after in itertools.pairwise(found.history))
    assert found.num_evaluations == len(found.history) == 400
    assert found.value == found.history[-1]


def test_a_seed_decides_everything() -> None:
    first, same, other = (swarm_search(bowl, 3, 200, seed) for seed in (4, 4, 5))
    assert torch.equal(first.point, same.point)
    assert first.history == same.history
    assert first.history != other.history
    assert by_chance(bowl, 30, 4).history == by_chance(bowl, 30, 4).history


def test_a_key_is_evaluated_once() -> None:
    for search in (lambda ask: swarm_search(ask, 3, 40, 0, cell), lambda ask: by_chance(ask, 40)):
        watched = Watched(bowl)
        found = search(watched)
        cells = [cell(point) for point in watched.points]
        assert len(set(cells)) == len(cells) == found.num_evaluations == 40


def test_a_search_ends_where_no_key_is_new() -> None:
    found = swarm_search(bowl, 3, 100, 0, lambda point: bool(point[0] < 0.5), max_steps=20)
    assert found.num_evaluations == 2
    assert by_chance(bowl, 1000).num_evaluations == 64


def test_steps_are_limited() -> None:
    """Short steps hit no side of the cube, so no two points are equal."""
    options = SwarmOptions(num_particles=5, step=0.3)
    assert swarm_search(bowl, 3, 10_000, 0, max_steps=4, options=options).num_evaluations == 20


def test_a_stuck_particle_starts_afresh_or_stays_at_its_best() -> None:
    """On a plateau nothing improves: the papers' rule goes back to a known point every other step."""
    asked = {}
    for restart in ("random", "best"):
        watched = Watched(lambda points: torch.zeros(len(points)))
        options = SwarmOptions(num_particles=1, patience=1, restart=restart)
        swarm_search(watched, 2, 50, 0, max_steps=50, options=options)
        asked[restart] = len(watched.points)
    assert asked["best"] <= 26 < 40 < asked["random"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        swarm_search(lambda points: torch.full((len(points),), torch.nan), 2, 10, 0)
    with pytest.raises(ValueError, match="nothing was evaluated"):
        swarm_search(bowl, 3, 0, 0)

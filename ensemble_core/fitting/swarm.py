"""Maximises a costly function of points in the unit cube: particle swarm and random search.

The swarm is that of Model Swarms (Feng et al. 2024, arXiv 2410.11163) and Heterogeneous Swarms (arXiv 2502.04510).
Three things differ from the papers: coordinates are clipped to [0, 1]; points of equal key (say, matrices that
decode to the same graph) are evaluated once; a particle that is stuck starts afresh at a random point. What is
counted and limited is evaluations, since each may be a run over a development set.

Holds: every point that is evaluated lies in the unit cube; no key is evaluated twice; the best value never falls;
the same seed gives the same result. Does not know what a point means.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

Evaluate = Callable[[Tensor], Tensor]  # (P, D) -> (P,), larger is better
Key = Callable[[Tensor], Hashable]  # of a point (D,)
Sample = Callable[[Generator], Tensor]  # -> (P, D)
MAX_STEPS = 1000


@dataclass(frozen=True, slots=True)
class SwarmOptions:
    """How particles move. The four parts of a velocity are weighted by these numbers, each times its own U(0, 1).

    step: the lambda of the papers. After each step it is multiplied by `decay`, down to `min_step`. A large one
    throws particles against the sides of the cube, where entries are 0 or 1: with few evaluations of graphs that
    did best, and with many a small bowl is still found.
    patience: steps without a better personal best after which a particle restarts.
    restart: `random` forgets the particle and draws a new one; `best` is the papers' rule, back to its personal
    best with no velocity.

    The numbers were tuned on hidden graphs and trees of 5 nodes with 100 evaluations, and judged on others.
    """

    num_particles: int = 15
    inertia: float = 0.6  # phi_v
    personal: float = 0.4  # phi_p, towards the particle's own best point
    social: float = 0.3  # phi_g, towards the best point of all
    repulsion: float = 0.05  # phi_w, away from the worst point of all
    step: float = 6.0
    decay: float = 0.98
    min_step: float = 1.0
    patience: int = 10
    restart: Literal["random", "best"] = "random"


@dataclass(frozen=True, slots=True)
class BestPoint:
    """What a search found. history: the best value so far after each evaluation, never falling."""

    point: Tensor  # (D,) float64
    value: float
    num_evaluations: int
    history: tuple[float, ...]


def itself(point: Tensor) -> Hashable:
    """The key under which only equal points are one."""
    return tuple(point.tolist())


def swarm_search(
    evaluate: Evaluate,
    num_dimensions: int,
    max_evaluations: int,
    seed: int,
    key: Key = itself,
    max_steps: int = MAX_STEPS,
    options: SwarmOptions = SwarmOptions(),
) -> BestPoint:
    """Search [0, 1]^D by swarm until `max_evaluations` distinct keys are evaluated or `max_steps` steps are done.

    Raises ValueError if there is nothing to evaluate, or a value is nan.
    """
    memo = _Memo(evaluate, key, max_evaluations)
    swarm = _Swarm(num_dimensions, options, torch.Generator().manual_seed(seed))
    for _ in range(max_steps):
        swarm.learn(memo.values(swarm.positions))
        if memo.is_full:
            break
        swarm.move()
    return memo.best()


def random_search(
    evaluate: Evaluate,
    sample: Sample,
    key: Key,
    max_evaluations: int,
    seed: int,
    max_steps: int = MAX_STEPS,
) -> BestPoint:
    """Draw points until `max_evaluations` distinct keys are evaluated or `sample` was called `max_steps` times.

    sample: draws a batch of points, (P, D). Raises ValueError as `swarm_search` does.
    """
    memo = _Memo(evaluate, key, max_evaluations)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_steps):
        memo.values(sample(generator))
        if memo.is_full:
            break
    return memo.best()


def uniform(num_points: int, num_dimensions: int, generator: Generator) -> Tensor:
    """(P, D) float64: points drawn evenly from the unit cube."""
    return torch.rand(num_points, num_dimensions, generator=generator, dtype=torch.float64)


class _Memo:
    """An objective that is asked once a key and at most `max_evaluations` times. Remembers the best point."""

    def __init__(self, evaluate: Evaluate, key: Key, max_evaluations: int) -> None:
        self._evaluate = evaluate
        self._key = key
        self._max_evaluations = max_evaluations
        self._known: dict[Hashable, float] = {}
        self._history: list[float] = []
        self._best: Tensor | None = None

    @property
    def is_full(self) -> bool:
        return len(self._known) >= self._max_evaluations

    def values(self, points: Tensor) -> Tensor:
        """(P,): the points' values; -inf where the budget did not reach, after which the search is over."""
        keys = [self._key(point) for point in points]
        self._learn(points, keys)
        return torch.tensor([self._known.get(key, -torch.inf) for key in keys], dtype=torch.float64)

    def best(self) -> BestPoint:
        if self._best is None:
            raise ValueError("nothing was evaluated; allow at least one evaluation and one step")
        return BestPoint(self._best, self._history[-1], len(self._history), tuple(self._history))

    def _learn(self, points: Tensor, keys: list[Hashable]) -> None:
        """Evaluate the first point of each unknown key, as far as the budget reaches."""
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._known}
        rows = sorted(first.values())[: self._max_evaluations - len(self._known)]
        if not rows:
            return
        for row, value in zip(rows, self._evaluate(points[rows]).tolist(), strict=True):
            self._note(points[row], keys[row], value)

    def _note(self, point: Tensor, key: Hashable, value: float) -> None:
        if value != value:
            raise ValueError("the value of a point is nan; a search needs numbers that can be compared")
        if self._best is None or value > self._history[-1]:
            self._best = point.clone()
        self._known[key] = value
        self._history.append(max([value, *self._history[-1:]]))


class _Swarm:
    """P particles: where they are, where they go, and the best that each has seen since it started."""

    def __init__(self, num_dimensions: int, options: SwarmOptions, generator: Generator) -> None:
        self._options = options
        self._generator = generator
        size = options.num_particles
        self.positions = uniform(size, num_dimensions, generator)  # (P, D)
        self._velocities = uniform(size, num_dimensions, generator) - self.positions  # towards another point
        self._personal = self.positions.clone()  # (P, D): each one's best point
        self._values = torch.full((size,), -torch.inf, dtype=torch.float64)  # (P,): and its value
        self._waits = torch.zeros(size, dtype=torch.long)  # (P,): steps since it was found
        self._best = self._worst = self.positions[0]  # of all, ever
        self._highest, self._lowest = -torch.inf, torch.inf
        self._step = options.step

    def learn(self, values: Tensor) -> None:
        """Take in the values (P,) of the present positions."""
        better = values > self._values
        self._personal = torch.where(better[:, None], self.positions, self._personal)
        self._values = torch.where(better, values, self._values)
        self._waits = torch.where(better, 0, self._waits + 1)
        high, low = int(values.argmax()), int(values.argmin())
        if values[high] > self._highest:
            self._best, self._highest = self.positions[high].clone(), float(values[high])
        if values[low] < self._lowest:
            self._worst, self._lowest = self.positions[low].clone(), float(values[low])

    def move(self) -> None:
        """One step of every particle; those that are stuck restart instead."""
        stuck = (self._waits >= self._options.patience)[:, None]  # (P, 1)
        self._velocities = self._pulled()
        self.positions = (self.positions + self._step * self._velocities).clamp(0, 1)
        self._restart(stuck)
        if self._step > self._options.min_step:
            self._step = max(self._options.min_step, self._step * self._options.decay)

    def _pulled(self) -> Tensor:
        """(P, D): the new velocities, weighted means of four directions (Model Swarms, equation 1)."""
        options, here = self._options, self.positions
        pulls = torch.stack([self._velocities, self._personal - here, self._best - here, here - self._worst])
        phis = torch.tensor([options.inertia, options.personal, options.social, options.repulsion]).double()
        weights = uniform(4, len(here), self._generator) * phis[:, None]  # (4, P)
        return torch.einsum("fp,fpd->pd", weights / weights.sum(dim=0), pulls)

    def _restart(self, stuck: Tensor) -> None:
        """stuck: (P, 1) bool."""
        num_particles, num_dimensions = self.positions.shape
        if self._options.restart == "best":
            place, velocity = self._personal, torch.zeros_like(self.positions)
        else:
            place = uniform(num_particles, num_dimensions, self._generator)
            velocity = uniform(num_particles, num_dimensions, self._generator) - place
            self._values = torch.where(stuck[:, 0], -torch.inf, self._values)
        self.positions = torch.where(stuck, place, self.positions)
        self._velocities = torch.where(stuck, velocity, self._velocities)
        self._waits = torch.where(stuck[:, 0], 0, self._waits)

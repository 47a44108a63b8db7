"""Tuned weights: the point of the simplex at which an objective is least, and weights in proportion to scores.

The search needs values of the objective alone, so it works for any fusion. It moves weight between two members at a
time: a coarse look at the whole segment (an objective need not be convex; for the linear pool it is), then golden
sections around the best point. Two members are one such segment; with more, all pairs take turns until nothing moves.
Knows numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations

from ensemble_core.errors import EvaluationError

Weights = tuple[float, ...]

_COARSE = 10  # parts of a segment that are looked at first
_GOLDEN = (math.sqrt(5) - 1) / 2
_MAX_TURNS = 10


def minimise(objective: Callable[[Weights], float], start: Weights, precision: float = 0.01) -> Weights:
    """The weights (sum 1) at which `objective` is least, each to about `precision`."""
    total = sum(start)
    best = tuple(weight / total for weight in start)
    known: dict[Weights, float] = {}

    def value(weights: Weights) -> float:
        if weights not in known:
            known[weights] = objective(weights)
        return known[weights]

    for _ in range(_MAX_TURNS if len(best) > 2 else 1):
        before = best
        for pair in combinations(range(len(best)), 2):
            best = min(best, _along(value, best, pair, precision), key=value)
        if max(abs(a - b) for a, b in zip(before, best, strict=True)) <= precision:
            break
    return best


def _along(
    value: Callable[[Weights], float], weights: Weights, pair: tuple[int, int], precision: float
) -> Weights:
    """The best way to share what two members have."""
    first, second = pair
    both = weights[first] + weights[second]

    def shared(share: float) -> Weights:
        parts = list(weights)
        parts[first], parts[second] = both * share, both * (1 - share)
        return tuple(parts)

    best = min(range(_COARSE + 1), key=lambda step: value(shared(step / _COARSE)))
    low, high = max(best - 1, 0) / _COARSE, min(best + 1, _COARSE) / _COARSE
    share = _golden(lambda x: value(shared(x)), low, high, precision)
    return min(shared(share), shared(best / _COARSE), key=value)


def _golden(value: Callable[[float], float], low: float, high: float, precision: float) -> float:
    """The least point of a segment, by golden sections (Kiefer 1953): one value a step."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > precision:
        if value(left) <= value(right):
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)
    return (low + high) / 2


def in_proportion(scores: Mapping[str, float]) -> Weights:
    """Weights in proportion to each member's score (DeePEn-Adapt). Raises EvaluationError where nobody scored."""
    total = sum(scores.values())
    if total <= 0:
        raise EvaluationError(f"all members score 0 ({', '.join(scores)}); tune with --method nll")
    return tuple(score / total for score in scores.values())

"""Tuned weights: the point of the simplex at which an objective is least, and weights in proportion to scores.

The search needs values of the objective alone, so it works for any fusion. It moves weight between two members at a
time: a coarse look at the whole segment (an objective need not be convex; for the linear pool it is), then parabolas
around the best point. Two members are one such segment; with more, all pairs take turns until nothing moves.
Knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

from ensemble_core.errors import EvaluationError

Weights = tuple[float, ...]
Objective = Callable[[Weights], float]

_COARSE = 10  # parts of a segment that are looked at first
_MAX_TURNS = 10


def minimise(
    objective: Objective, start: Weights, precision: float = 0.01, screen: Objective | None = None
) -> Weights:
    """The weights (sum 1) at which `objective` is least, each to about `precision`.

    screen: a cheaper objective for the coarse looks; the result is never worse than the start by `objective` itself.
    """
    total = sum(start)
    best = tuple(weight / total for weight in start)
    value = _remembered(objective)
    glance = value if screen is None else _remembered(screen)
    for _ in range(_MAX_TURNS if len(best) > 2 else 1):
        before = best
        for pair in combinations(range(len(best)), 2):
            best = min(best, _along(value, glance, best, pair, precision), key=value)
        if max(abs(a - b) for a, b in zip(before, best, strict=True)) <= precision:
            break
    return best


def _remembered(objective: Objective) -> Objective:
    known: dict[Weights, float] = {}

    def value(weights: Weights) -> float:
        if weights not in known:
            known[weights] = objective(weights)
        return known[weights]

    return value


def _along(
    value: Objective, glance: Objective, weights: Weights, pair: tuple[int, int], precision: float
) -> Weights:
    """The best way to share what two members have."""
    first, second = pair
    both = weights[first] + weights[second]

    def shared(share: float) -> Weights:
        parts = list(weights)
        parts[first], parts[second] = both * share, both * (1 - share)
        return tuple(parts)

    best = min(range(_COARSE + 1), key=lambda step: glance(shared(step / _COARSE)))
    low, high = max(best - 1, 0) / _COARSE, min(best + 1, _COARSE) / _COARSE
    return shared(_least(lambda x: value(shared(x)), low, high, precision))


def _least(value: Callable[[float], float], low: float, high: float, precision: float) -> float:
    """The least point of a segment: the vertex of the parabola through three points, again and again."""
    middle = (low + high) / 2
    while high - low > 2.5 * precision:  # so that a probe on the wider side is within
        if value(low) <= value(middle):
            middle, high = (low + middle) / 2, middle
        elif value(high) <= value(middle):
            low, middle = middle, (middle + high) / 2
        else:
            probe = _vertex(value, low, middle, high)
            if abs(probe - middle) < precision:  # as good as there, if it is a parabola: look at the wider side
                probe = middle + (precision if high - middle > middle - low else -precision)
            low, middle, high = _narrowed(value, low, middle, high, probe)
    return min((low, middle, high), key=value)


def _vertex(value: Callable[[float], float], low: float, middle: float, high: float) -> float:
    """Where the parabola through three points is least; the middle one is below both others."""
    left, right = value(low) - value(middle), value(high) - value(middle)
    below, above = (middle - low) * right, (high - middle) * left
    return middle + 0.5 * ((high - middle) * above - (middle - low) * below) / (above + below)


def _narrowed(
    value: Callable[[float], float], low: float, middle: float, high: float, probe: float
) -> tuple[float, float, float]:
    """The three points that shut the least value in, of four of which the outer two are known to be no better."""
    left, right = sorted((middle, probe))
    return (low, left, right) if value(left) <= value(right) else (left, right, high)


def in_proportion(scores: Mapping[str, float]) -> Weights:
    """Weights in proportion to each member's score (DeePEn-Adapt). Raises EvaluationError where nobody scored."""
    total = sum(scores.values())
    if total <= 0:
        raise EvaluationError(f"all members score 0 ({', '.join(scores)}); tune with --method nll")
    return tuple(score / total for score in scores.values())

"""The search over the simplex, and weights by score."""

from __future__ import annotations

import pytest

from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.tune import rounded
from ensemble_core.evaluation.weights import Weights, in_proportion, minimise


def squares(target: Weights) -> object:
    return lambda weights: sum((a - b) ** 2 for a, b in zip(weights, target, strict=True))


@pytest.mark.parametrize("target", [(0.73, 0.27), (1.0, 0.0), (0.0, 1.0), (0.2, 0.5, 0.3), (0.0, 0.4, 0.6, 0.0)])
def test_the_least_point_of_a_bowl_is_found(target: Weights) -> None:
    start = tuple(1.0 for _ in target)
    found = minimise(squares(target), start, precision=0.004)  # type: ignore[arg-type]
    assert found == pytest.approx(target, abs=0.01)
    assert sum(found) == pytest.approx(1.0)


def test_a_second_valley_does_not_hide_the_deeper_one() -> None:
    def two_valleys(weights: Weights) -> float:
        x = weights[0]
        return min((x - 0.2) ** 2, (x - 0.85) ** 2 - 0.01)

    assert minimise(two_valleys, (0.2, 0.8))[0] == pytest.approx(0.85, abs=0.01)


def test_no_point_is_worse_than_the_start() -> None:
    calls: list[Weights] = []

    def spike(weights: Weights) -> float:
        calls.append(weights)
        return -1.0 if weights == (0.123, 0.877) else weights[0]

    assert minimise(spike, (0.123, 0.877)) == (0.123, 0.877)
    assert len(calls) == len(set(calls)) < 30


def test_weights_are_in_proportion_to_scores() -> None:
    assert in_proportion({"a": 0.6, "b": 0.2}) == pytest.approx((0.75, 0.25))
    with pytest.raises(EvaluationError, match="nll"):
        in_proportion({"a": 0.0, "b": 0.0})


def test_rounded_weights_still_sum_to_one() -> None:
    assert rounded((1 / 3, 1 / 3, 1 / 3)) == (0.334, 0.333, 0.333)
    assert rounded((0.99996, 0.00004)) == (1.0, 0.0)

"""From items to results: values, the best member, pairs, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_core.evaluation.plot import plot
from ensemble_core.evaluation.report import POOLED, Report, Result, summarise, tables


def row(bits: float, **more: Any) -> dict[str, Any]:
    sums = {"num_bytes": 10.0, "positions": 4.0, "shared_nats": bits / 2, "main_nats": bits, "overruled": 1.0}
    return sums | {"bits": bits, "ruled_out": 0.0, "agreed": {}, "unmapped": {}} | more


def fused(bits: float) -> dict[str, Any]:
    return row(bits, agreed={"b": 3.0}, unmapped={"a": 0.0, "b": 0.4})


ITEMS: dict[str, dict[str, dict[int, Any]]] = {
    "a": {"t": {i: row(10.0 + i) for i in range(6)}, "u": {0: {"correct": 1, "correct_per_byte": 0}}},
    "b": {"t": {i: row(12.0 + i) for i in range(6)}, "u": {0: {"correct": 0, "correct_per_byte": 1}}},
    "duo": {"t": {i: fused(9.0 + i) for i in range(6)}, "u": {0: {"correct": 1, "correct_per_byte": 1}}},
}


@pytest.fixture(scope="module")
def report() -> Report:
    return summarise(ITEMS, ["a", "b"])


def result(report: Report, task: str, metric: str, model: str) -> Result:
    (found,) = [r for r in report.results if (r.task, r.metric, r.model) == (task, metric, model)]
    return found


def test_models_are_compared_with_the_best_member_over_the_same_items(report: Report) -> None:
    duo = result(report, "t", "bits_per_byte", "duo")
    assert duo.value.value == pytest.approx(1.15)
    assert duo.reference == "a"
    assert duo.difference is not None
    assert (duo.difference.low, duo.difference.high) == pytest.approx((-0.1, -0.1))
    assert result(report, "t", "bits_per_byte", "a").difference is None
    assert result(report, "u", "accuracy_per_byte", "duo").reference == "b"


def test_shared_positions_are_compared_with_main_there(report: Report) -> None:
    duo = result(report, "t", "nats_per_shared_position", "duo")
    assert duo.value.value == pytest.approx(69.0 / 2 / 24)
    assert duo.difference is not None
    assert duo.difference.value == pytest.approx(-69.0 / 2 / 24)
    assert result(report, "t", "nats_per_shared_position", "a").difference is None


def test_all_tasks_are_pooled_where_they_have_the_metric(report: Report) -> None:
    pooled = result(report, POOLED, "bits_per_byte", "duo")
    assert pooled.num_items == 6
    assert pooled.value == result(report, "t", "bits_per_byte", "duo").value


def test_models_with_other_items_are_not_paired() -> None:
    fewer = {**ITEMS, "duo": {"t": {i: fused(9.0) for i in range(5)}}}
    assert result(summarise(fewer, ["a", "b"]), "t", "bits_per_byte", "duo").difference is None


def test_diagnoses_are_per_shared_position(report: Report) -> None:
    (diagnosis,) = [d for d in report.diagnoses if d.task == "t"]
    assert (diagnosis.model, diagnosis.positions, diagnosis.overruled) == ("duo", 24, 0.25)
    assert (diagnosis.agreed, diagnosis.unmapped["b"]) == ({"b": 0.75}, pytest.approx(0.1))


def test_results_can_be_read_drawn_and_parsed(report: Report, tmp_path: Path) -> None:
    assert json.loads(json.dumps(report.as_json()))["results"][0]["model"] == "a"
    text = tables(report)
    assert "-0.1000 .. -0.1000" in text
    assert "b 75.0%" in text
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"

"""Turns items into results: values with intervals, differences to the best member, diagnostics; as tables and JSON.

The best member is chosen on the very items that are reported, which makes it harder to beat. Knows items' values;
does not know models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.journal import Values

POOLED = "all tasks"


@dataclass(frozen=True, slots=True)
class Metric:
    """A ratio of sums over items. denominator "": the number of items."""

    name: str
    numerator: str
    denominator: str
    lower_is_better: bool
    own_main: str = ""  # compare with this numerator of the same items, not with the best member's value


METRICS = (
    Metric("bits_per_byte", "bits", "num_bytes", lower_is_better=True),
    Metric("nats_per_shared_position", "shared_nats", "positions", lower_is_better=True, own_main="main_nats"),
    Metric("accuracy", "correct", "", lower_is_better=False),
    Metric("accuracy_per_byte", "correct_per_byte", "", lower_is_better=False),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One metric of one model on one task. difference: to `reference`, over the same items; None if there is none."""

    task: str
    metric: str
    model: str
    value: Interval
    num_items: int
    reference: str
    difference: Interval | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """How a fusion acts at shared positions: shares of positions, and mean mass per position."""

    task: str
    model: str
    positions: int
    overruled: float
    ruled_out: int
    agreed: Mapping[str, float]
    unmapped: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """All results of a run."""

    results: list[Result]
    diagnoses: list[Diagnosis]

    def as_json(self) -> dict[str, object]:
        """The report as plain JSON objects."""
        return {
            "results": [asdict(result) for result in self.results],
            "diagnoses": [asdict(diagnosis) for diagnosis in self.diagnoses],
        }


# model -> task -> index of the record -> values
Items = Mapping[str, Mapping[str, Mapping[int, Values]]]


def summarise(items: Items, members: Iterable[str]) -> Report:
    """Every metric of every model on every task and over all tasks. members: the models that are single members."""
    tasks = list(dict.fromkeys(task for by_task in items.values() for task in by_task))
    alone = [model for model in members if model in items]
    results, diagnoses = [], []
    for task in [*tasks, POOLED] if len(tasks) > 1 else tasks:
        rows = {model: _rows(by_task, task) for model, by_task in items.items()}
        for metric in METRICS:
            results += _results(task, metric, rows, alone)
        diagnoses += [_diagnosis(task, model, list(found.values())) for model, found in rows.items()]
    return Report(results, [diagnosis for diagnosis in diagnoses if diagnosis is not None])


def _rows(by_task: Mapping[str, Mapping[int, Values]], task: str) -> dict[tuple[str, int], Values]:
    chosen = by_task if task == POOLED else {task: by_task.get(task, {})}
    return {(name, index): values for name, found in chosen.items() for index, values in sorted(found.items())}


def _results(
    task: str, metric: Metric, rows: Mapping[str, Mapping[tuple[str, int], Values]], alone: Sequence[str]
) -> list[Result]:
    """One metric of all models that have it."""
    keys = {
        model: [key for key, values in found.items() if metric.numerator in values]
        for model, found in rows.items()
    }
    ratios = {model: _ratio(metric, [rows[model][key] for key in own]) for model, own in keys.items() if own}
    best = _best(metric, {model: ratios[model] for model in alone if model in ratios})
    results = []
    for model, ratio in ratios.items():
        counts = draws(len(keys[model]))
        reference, other = best, ratios.get(best)
        if metric.own_main:
            reference, other = (
                "its main",
                _ratio(metric, [rows[model][key] for key in keys[model]], metric.own_main),
            )
        paired = other is not None and model not in (best, *(alone if metric.own_main else ()))
        paired = paired and (bool(metric.own_main) or keys[model] == keys[best])
        difference = paired_interval(ratio, other, counts) if paired and other is not None else None
        results.append(
            Result(task, metric.name, model, interval(ratio, counts), len(keys[model]), reference, difference)
        )
    return results


def _best(metric: Metric, ratios: Mapping[str, Ratio]) -> str:
    choose: Callable[..., str] = min if metric.lower_is_better else max
    return choose(ratios, key=lambda model: ratios[model].value) if ratios else ""


def _ratio(metric: Metric, rows: Sequence[Values], numerator: str = "") -> Ratio:
    above = [float(row[numerator or metric.numerator]) for row in rows]
    below = [float(row[metric.denominator]) if metric.denominator else 1.0 for row in rows]
    return Ratio(torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64))


def _diagnosis(task: str, model: str, rows: Sequence[Values]) -> Diagnosis | None:
    rows = [row for row in rows if row.get("agreed")]
    positions = sum(row["positions"] for row in rows)
    if not positions:
        return None
    return Diagnosis(
        task,
        model,
        round(positions),
        sum(row["overruled"] for row in rows) / positions,
        round(sum(row["ruled_out"] for row in rows)),
        _means(rows, "agreed", positions),
        _means(rows, "unmapped", positions),
    )


def _means(rows: Sequence[Values], name: str, positions: float) -> dict[str, float]:
    return {member: sum(row[name][member] for row in rows) / positions for member in rows[0][name]}


def tables(report: Report) -> str:
    """Results and diagnoses as text."""
    head = ("task", "metric", "model", "items", "value", "95 % interval", "against", "difference", "95 % interval")
    lines = [
        (
            *(result.task, result.metric, result.model, str(result.num_items)),
            *_shown(result.value),
            *((result.reference, *_shown(result.difference, sign="+")) if result.difference else ("", "", "")),
        )
        for result in report.results
    ]
    text = aligned([head, *lines])
    if report.diagnoses:
        heads = ("task", "model", "shared positions", "overruled", "ruled out", "agreed", "unmapped")
        text += "\n\n" + aligned([heads, *(_diagnosis_line(diagnosis) for diagnosis in report.diagnoses)])
    return text


def _shown(found: Interval, sign: str = "") -> tuple[str, str]:
    return f"{found.value:{sign}.4f}", f"{found.low:{sign}.4f} .. {found.high:{sign}.4f}"


def _diagnosis_line(diagnosis: Diagnosis) -> tuple[str, ...]:
    agreed = ", ".join(f"{member} {share:.1%}" for member, share in diagnosis.agreed.items())
    unmapped = ", ".join(f"{member} {mass:.4f}" for member, mass in diagnosis.unmapped.items())
    counts = (str(diagnosis.positions), f"{diagnosis.overruled:.1%}", str(diagnosis.ruled_out))
    return (diagnosis.task, diagnosis.model, *counts, agreed, unmapped)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A text table; each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

"""Results as a PNG: one panel per metric, one row per model, one mark per task, 95 % intervals. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.report import Report, Result


def require_matplotlib() -> Any:
    """The Figure class. Raises EvaluationError, which names the extra, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError("plots need matplotlib: pip install 'unisono[eval]', or pass --no-plot") from error
    return Figure


def plot(report: Report, path: Path) -> None:
    """Plot all results to a PNG file."""
    metrics = list(dict.fromkeys(result.metric for result in report.results))
    models = list(dict.fromkeys(result.model for result in report.results))
    size = (6.5 * len(metrics), 1.6 + 0.55 * len(models))
    figure = require_matplotlib()(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        _draw(panel, [result for result in report.results if result.metric == metric], models)
        panel.set_title(metric.replace("_", " "))
    panels[0].set_yticks(range(len(models)), models)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def _draw(panel: Any, results: Sequence[Result], models: Sequence[str]) -> None:
    tasks = list(dict.fromkeys(result.task for result in results))
    for rank, task in enumerate(tasks):
        own = [result for result in results if result.task == task]
        heights = [models.index(result.model) + 0.6 * ((rank + 0.5) / len(tasks) - 0.5) for result in own]
        values = [result.value for result in own]
        spread = [[value.value - value.low for value in values], [value.high - value.value for value in values]]
        panel.errorbar([value.value for value in values], heights, xerr=spread, fmt="o", markersize=4, label=task)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(fontsize="small")

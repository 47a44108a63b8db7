"""Evaluation as the command line asks for it: texts and paths in, tables out. The one door into this package."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ensemble_core.config import Config
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.evaluate import Destination, Scope, evaluate
from ensemble_core.evaluation.measures import Measure, Selection
from ensemble_core.evaluation.report import aligned, tables
from ensemble_core.evaluation.tasks import Split, Task, parse_task
from ensemble_core.evaluation.tune import Method, Tuned, tune
from ensemble_core.evaluation.variants import Variant, parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.evaluation.yaml_weights import write_weights

logger = logging.getLogger(__name__)

__all__ = ["Chosen", "Destination", "evaluate_models", "parse_measures", "tune_ensemble"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What both commands choose.

    tasks: `NAME=FILE`. cache: folder of stored scores, None for the default one. skip_bad: leave out records that
    do not fit.
    """

    tasks: Sequence[str]
    split: Split
    limit: int | None
    shots: int
    cache: Path | None
    skip_bad: bool = False

    @property
    def selection(self) -> Selection:
        """Which items."""
        return Selection(self.split, self.limit, self.shots)

    def parsed_tasks(self) -> list[Task]:
        """The tasks, read. Raises EvaluationError, also where two have one name."""
        tasks = [parse_task(spec, self.skip_bad) for spec in self.tasks]
        if len({task.name for task in tasks}) < len(tasks):
            raise EvaluationError(f"--task: two have the same name, among {', '.join(t.name for t in tasks)}")
        return tasks


def parse_measures(names: Sequence[str]) -> tuple[Measure, ...]:
    """Measures by name; none: all. Raises EvaluationError."""
    known: tuple[Measure, ...] = get_args(Measure)
    if unknown := [name for name in names if name not in known]:
        raise EvaluationError(f"--measure {unknown[0]!r}: known are {', '.join(known)}")
    return tuple(name for name in known if not names or name in names)


def evaluate_models(
    config: Config,
    chosen: Chosen,
    models: Sequence[str],
    measures: tuple[Measure, ...],
    destination: Destination,
) -> str:
    """Tables of all models on all tasks. models: names and variants; none: all of the configuration's."""
    names = models or _all_models(config)
    variants = [parse_variant(spec) for spec in dict.fromkeys(names)]
    scope = Scope(chosen.parsed_tasks(), variants, chosen.selection, measures)
    with Workbench(config, chosen.cache) as bench:
        return tables(evaluate(bench, scope, destination))


def _all_models(config: Config) -> list[str]:
    """Every ensemble and member but those whose weights follow a prompt, which a document does not have."""
    prompted = [name for name, each in config.ensembles.items() if each.weighting.by == "perplexity"]
    for name in prompted:
        logger.warning(
            "%s is left out: its weights follow each prompt, and a document has none; name it (--model) with "
            "--measure score and tasks that are answered by completions",
            name,
        )
    return [name for name in (*config.ensembles, *config.members) if name not in prompted]


def tune_ensemble(
    config: Config, chosen: Chosen, ensemble: str, method: Method, num_positions: int, write_to: Path | None
) -> str:
    """Tune an ensemble's weights, write them into a configuration file if one is given; what came of it, in words."""
    variant = parse_variant(ensemble)
    if write_to is not None and variant.label != variant.model:
        raise EvaluationError(f"--write: {ensemble!r} is a variant; the file's ensemble is another one")
    with Workbench(config, chosen.cache) as bench:
        tuned = tune(bench, variant, chosen.parsed_tasks(), method, chosen.selection, num_positions)
    return told(tuned, write_tuned(tuned, variant, write_to))


def write_tuned(tuned: Tuned, variant: Variant, path: Path | None) -> Path | None:
    """Write the weights into a configuration file, where one is given."""
    if path is not None:
        write_weights(path, variant.model, dict(zip(tuned.members, tuned.after, strict=True)))
    return path


def told(tuned: Tuned, written: Path | None) -> str:
    """What came of tuning, as tables."""
    pairs = zip(tuned.members, tuned.before, tuned.after, strict=True)
    weights = aligned([("member", "before", "after"), *((m, f"{a:.3f}", f"{b:.3f}") for m, a, b in pairs)])
    where = "on the half that was not tuned on" if tuned.held_out else "in sample: on all that was tuned on"
    lines = [("model", "bits per byte", "95 % interval", "against", "difference", "95 % interval")]
    for result in tuned.results:
        value, difference = result.value, result.difference
        shown = ("", "", "")
        if difference is not None:
            edges = f"{difference.low:+.4f} .. {difference.high:+.4f}"
            shown = (result.reference, f"{difference.value:+.4f}", edges)
        lines.append((result.model, f"{value.value:.4f}", f"{value.low:.4f} .. {value.high:.4f}", *shown))
    end = f"written to {written}" if written else "not written; pass --write to put them into the file"
    return f"{weights}\n\n{where}:\n{aligned(lines)}\n\n{end}"

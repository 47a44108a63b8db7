"""Finds an ensemble's weights on one half of the tasks and reports on the other: what `unisono tune` does.

`nll` minimises the fused negative log-likelihood per shared position over the simplex; `score` sets weights in
proportion to each member's accuracy. Either way the report is in bits per byte, on documents that tuning did not see
unless the split is `all`. Does not know the command line or YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tqdm import tqdm

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.evaluate import Destination, Scope, evaluate
from ensemble_core.evaluation.likelihood import Likelihood
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.offline import DocumentSums, shared_positions
from ensemble_core.evaluation.report import Result, summarise
from ensemble_core.evaluation.scores import Scores, join_scores
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.weights import Weights, in_proportion
from ensemble_core.evaluation.workbench import Workbench

Method = Literal["nll", "score"]
NUM_POSITIONS = 5000  # enough to determine a weight: the optimum is flat
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class Tuned:
    """Weights by member, main first, and how well they do. results: bits per byte on the held-out half."""

    members: tuple[str, ...]
    before: Weights
    after: Weights
    results: list[Result]
    held_out: bool  # False: all items were used for tuning, so the results are in sample


def tune(
    bench: Workbench,
    variant: Variant,
    tasks: Sequence[Task],
    method: Method,
    selection: Selection,
    num_positions: int = NUM_POSITIONS,
) -> Tuned:
    """Tune the weights of an ensemble (or a variant of it). Raises EvaluationError for a single member.

    num_positions: the most shared positions that `nll` uses, spread evenly over the documents.
    """
    recipe = bench.recipe(variant)
    if len(recipe.members) < 2:
        raise EvaluationError(f"--ensemble {variant.label!r}: a member alone has no weights; name an ensemble")
    if method == "nll":
        after = _least_nats(bench, recipe, tasks, selection, num_positions)
    else:
        after = _by_score(bench, recipe, tasks, selection)
    after = rounded(after)
    results = judged(bench, recipe, replace(recipe, weights=after), tasks, selection.other())
    return Tuned(recipe.members, recipe.weights, after, results, held_out=selection.split != "all")


def rounded(weights: Weights) -> Weights:
    """Rounded to three decimals that sum to 1; the largest weight absorbs the remainder."""
    parts = [round(weight, 3) for weight in weights]
    parts[parts.index(max(parts))] += 1.0 - sum(parts)
    return tuple(round(part, 3) for part in parts)


def _least_nats(
    bench: Workbench, recipe: Recipe, tasks: Sequence[Task], selection: Selection, num_positions: int
) -> Weights:
    """Weights only matter at shared positions; elsewhere main predicts alone."""
    scores = stored(bench, recipe, tasks, selection)
    shared = shared_positions(scores, recipe.members).spread(num_positions)
    if not len(shared.rows):
        raise EvaluationError(
            f"{', '.join(recipe.members)}: the tasks have no position where all members have a token boundary"
        )
    with tqdm(desc="tuning", unit="position", unit_scale=True, disable=None) as bar:
        return Likelihood(scores, recipe, shared, bench.num_candidates, bar.update).best_weights()


def _by_score(bench: Workbench, recipe: Recipe, tasks: Sequence[Task], selection: Selection) -> Weights:
    """Weights in proportion to accuracy over all items."""
    asked = [task for task in tasks if task.kind != "text"]
    if not asked:
        raise EvaluationError("--method score needs a task with answers; these are all plain texts")
    members = [Variant(name, name, Overrides()) for name in recipe.members]
    report = evaluate(bench, Scope(asked, members, selection, ("score",)), Destination())
    last = {result.model: result.value.value for result in report.results if result.metric == "accuracy"}
    return in_proportion({name: last[name] for name in recipe.members})


def judged(
    bench: Workbench, recipe: Recipe, after: Recipe, tasks: Sequence[Task], selection: Selection
) -> list[Result]:
    """Bits per byte of every member and of the ensemble before and after, against the best member."""
    scores = stored(bench, recipe, tasks, selection)
    models = {name: Recipe(name, (name,), (1.0,), None, "single") for name in recipe.members}
    models |= {BEFORE: recipe, AFTER: after}
    items = {label: {"tuning": _rows(bench.sums(scores, model))} for label, model in models.items()}
    report = summarise(items, recipe.members)
    return [result for result in report.results if result.metric == "bits_per_byte"]


def _rows(sums: DocumentSums) -> dict[int, dict[str, float]]:
    pairs = zip(sums.bits.tolist(), sums.num_bytes.tolist(), strict=True)
    return {index: {"bits": bits, "num_bytes": size} for index, (bits, size) in enumerate(pairs) if size > 0}


def stored(bench: Workbench, recipe: Recipe, tasks: Sequence[Task], selection: Selection) -> Scores:
    """All members' scores of the tasks' documents; collected where they are not stored yet."""
    return join_scores(
        [
            bench.scores(measures.documents(task, selection.items(task)), recipe.members, f"{task.name}: bits")
            for task in tasks
        ]
    )

"""Finds the edges of a graph council on one half of the tasks and reports on the other.

The nodes and their models are those of the configuration; what is searched for is who reads whom, and who answers.
A graph is worth the share of questions that it answers rightly. Does not know the command line, nor how graphs are
searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ensemble_core.council_config import GraphConfig
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.graphs import Dag, Found, find_graph

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FittedGraph:
    """found: on the items it was searched on. The others are of items that were not: right answers.

    difference: from the best single model of the nodes.
    """

    edges: Edges
    found: Found
    values: dict[str, Interval]
    best: str
    difference: Interval

    @property
    def is_sure(self) -> bool:
        """Whether the whole interval of the gain over the best single model is above 0."""
        return self.difference.low > 0


@dataclass(frozen=True, slots=True)
class _Bench:
    """A council whose edges change, and the items that it is judged on."""

    bench: Workbench
    name: str
    council: GraphConfig
    tasks: Sequence[Task]

    def edges(self, dag: Dag) -> Edges:
        nodes = list(self.council.nodes)
        return tuple((nodes[source], nodes[target]) for source, target in sorted(dag.edges))

    def with_edges(self, edges: Edges) -> None:
        config = self.bench.config
        changed = self.council.model_copy(update={"edges": edges})
        councils = config.councils | {self.name: changed}
        self.bench.llm().use_councils(config.model_copy(update={"councils": councils}))

    def right(self, model: str, selection: Selection) -> torch.Tensor:
        """(N,) 1 for each item that a model answers rightly."""
        variant = Variant(model, model, Overrides())
        found: list[float] = []
        for task in self.tasks:
            items, examples = selection.items(task), selection.examples(task)
            for done in measures.completions(self.bench, variant, task, items, examples):
                found += [float(done[index]["correct"]) for index in sorted(done)]
        return torch.tensor(found, dtype=torch.float64)


def fit_graph(
    bench: Workbench, name: str, tasks: Sequence[Task], selection: Selection, budget: int, seed: int
) -> FittedGraph:
    """Search for the best edges. budget: graphs that are tried where there are too many for all.

    Raises EvaluationError for a council of another kind, and for tasks that are not answered in words.
    """
    council = bench.config.councils.get(name)
    if not isinstance(council, GraphConfig):
        raise EvaluationError(f"--council {name!r}: is no council of kind graph")
    if wrong := [task.name for task in tasks if task.kind not in ("number", "answer")]:
        raise EvaluationError(
            f"--task {wrong[0]}: a graph is judged by what it writes; give tasks of numbers or answers"
        )
    at_work = _Bench(bench, name, council, tasks)
    with tqdm(desc="graphs", unit="graph", disable=None) as bar:

        def utility(dag: Dag) -> float:
            at_work.with_edges(at_work.edges(dag))
            bar.update()
            return float(at_work.right(name, selection).mean())

        found = find_graph(utility, len(council.nodes), budget, seed)
    return _judged(at_work, found, selection.other())


def _judged(at_work: _Bench, found: Found, selection: Selection) -> FittedGraph:
    council, name = at_work.council, at_work.name
    ways = {model: at_work.right(model, selection) for model in council.called}
    at_work.with_edges(council.edges)
    ways["as configured"] = at_work.right(name, selection)
    edges = at_work.edges(found.dag)
    at_work.with_edges(edges)
    ways["found"] = at_work.right(name, selection)
    counts = draws(len(ways["found"]))
    ratios = {way: Ratio(right, torch.ones_like(right)) for way, right in ways.items()}
    best = max(council.called, key=lambda model: ratios[model].value)
    values = {way: interval(ratio, counts) for way, ratio in ratios.items()}
    return FittedGraph(edges, found, values, best, paired_interval(ratios["found"], ratios[best], counts))


def told_graph(fitted: FittedGraph) -> str:
    """The graph as YAML, what it is worth, and what chance found."""
    found = fitted.found
    edges = ", ".join(f"[{source}, {target}]" for source, target in fitted.edges)
    how = (
        f"all {found.evaluations} graphs"
        if found.method == "exact"
        else f"a swarm over {found.evaluations} graphs"
    )
    chance = "" if found.random_value is None else f"; random search over as many: {found.random_value:.4f}"
    lines = [f"edges: [{edges}]", "", f"{how}: {found.value:.4f} of the answers it was fitted on{chance}", ""]
    lines.append("on items that were not fitted on:")
    lines += [
        f"  {way}: {each.value:.4f} ({each.low:.4f} .. {each.high:.4f})" for way, each in fitted.values.items()
    ]
    gain = fitted.difference
    lines.append(f"  found against {fitted.best}: {gain.value:+.4f} ({gain.low:+.4f} .. {gain.high:+.4f})")
    if not fitted.is_sure:
        lines += ["", "the gain over the best single model may be chance"]
    return "\n".join(lines)

"""Finds the edges of a graph council on one half of the tasks and reports on the other.

The nodes and their models are those of the configuration; what is searched for is who reads whom, and who answers.
A graph is worth the share of questions that it answers rightly. Does not know the command line, nor how graphs are
searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ensemble_core.council_config import GraphConfig, NodeConfig
from ensemble_core.decoding.requests import Overrides
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.bootstrap import Interval, Ratio
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.compared import Compared, compare, gain_of, table_of
from ensemble_core.fitting.graphs import Dag, Found, find_graph, importance

Edges = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FittedGraph:
    """found: on the items it was searched on. compared: right answers on items that were not.

    parts: model -> its JFK-score on the items of the search; empty: not asked for.
    """

    edges: Edges
    found: Found
    compared: list[Compared]
    gain: Interval
    parts: Mapping[str, float]

    @property
    def is_sure(self) -> bool:
        """Whether the whole interval of the gain over the best single model is above 0."""
        return self.gain.low > 0


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

    def with_edges(self, edges: Edges, nodes: Mapping[str, NodeConfig] | None = None) -> None:
        """nodes: None: as configured."""
        config = self.bench.config
        changed = self.council.model_copy(update={"edges": edges, "nodes": nodes or self.council.nodes})
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
    bench: Workbench,
    name: str,
    tasks: Sequence[Task],
    selection: Selection,
    budget: int,
    seed: int,
    num_draws: int = 0,
) -> FittedGraph:
    """Search for the best edges. budget: graphs that are tried where there are too many for all.

    num_draws: assignments of the models to the nodes of the best graph, for each model's part in it.
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
    parts = _parts(at_work, at_work.edges(found.dag), selection, num_draws, seed)
    return _judged(at_work, found, selection.other(), parts)


def _parts(at_work: _Bench, edges: Edges, selection: Selection, num_draws: int, seed: int) -> dict[str, float]:
    """Model -> JFK-score over random assignments of the models to the nodes."""
    if not num_draws:
        return {}
    council = at_work.council
    models = council.called
    with tqdm(desc="parts", unit="graph", disable=None) as bar:

        def utility(assigned: Sequence[int]) -> float:
            pairs = zip(council.nodes.items(), assigned, strict=True)
            nodes = {node: each.model_copy(update={"model": models[rank]}) for (node, each), rank in pairs}
            at_work.with_edges(edges, nodes)
            bar.update()
            return float(at_work.right(at_work.name, selection).mean())

        scores = importance(utility, len(models), len(council.nodes), num_draws, seed)
    return dict(zip(models, scores.tolist(), strict=True))


def _judged(at_work: _Bench, found: Found, selection: Selection, parts: Mapping[str, float]) -> FittedGraph:
    council, name = at_work.council, at_work.name
    alone = torch.stack([at_work.right(model, selection) for model in council.called])  # (M, N)
    singles = dict(zip(council.called, map(_ratio, alone), strict=True))
    at_work.with_edges(council.edges)
    before = at_work.right(name, selection)
    edges = at_work.edges(found.dag)
    at_work.with_edges(edges)
    ways = {
        "found": _ratio(at_work.right(name, selection)),
        "as configured": _ratio(before),
        "best choice of a model": _ratio(alone.amax(0)),
        "random": _ratio(alone.mean(0)),
    }
    compared = compare(singles, ways)
    return FittedGraph(edges, found, compared, gain_of(compared, "found"), parts)


def _ratio(right: torch.Tensor) -> Ratio:
    return Ratio(right, torch.ones_like(right))


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
    lines.append(f"right answers on items that were not fitted on:\n{table_of(fitted.compared)}")
    if fitted.parts:
        shown = ", ".join(f"{model} {score:.4f}" for model, score in fitted.parts.items())
        lines += ["", f"part of each model (JFK-score over random assignments): {shown}"]
    if not fitted.is_sure:
        lines += ["", "the gain over the best single model may be chance"]
    return "\n".join(lines)

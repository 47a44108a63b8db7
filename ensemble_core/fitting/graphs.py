"""Graphs of models as a swarm sees them: matrices in [0, 1] that decode to DAGs, and the search for the best DAG.

After Heterogeneous Swarms (Feng et al. 2025, arXiv 2502.04510): an edge n -> m means that node m reads what node n
wrote; the end node's text is the answer. A matrix says how much each node wants to be read by each other.

Holds: every finite matrix decodes to a DAG in which all nodes reach the one end; up to four nodes the best graph
is found by trying all of them. Does not know what a node does, nor how a graph is run: a caller gives its utility.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ensemble_core.fitting.swarm import random_search, swarm_search, uniform

Edge = tuple[int, int]  # the node that is read, the node that reads
MAX_ENUMERATED = 4  # nodes: 316 graphs; five nodes have 16,885
_BATCH = 10  # matrices that random search draws at a time
_Row = list[float]


@dataclass(frozen=True, slots=True)
class Dag:
    """A directed graph without circles whose one node without successors is `end`; so every node reaches it.

    Raises ValueError if the edges are not such a graph over nodes 0 to num_nodes - 1.
    """

    edges: frozenset[Edge]
    end: int
    num_nodes: int

    def __post_init__(self) -> None:
        if not all(0 <= node < self.num_nodes for edge in self.edges for node in edge):
            raise ValueError(f"the edges {sorted(self.edges)} name nodes outside 0 to {self.num_nodes - 1}")
        if _ends(self.edges, self.num_nodes) != [self.end]:
            raise ValueError(f"node {self.end} is not the one node without successors")
        if len(self.order()) < self.num_nodes:
            raise ValueError(f"the edges {sorted(self.edges)} go in a circle")

    def order(self) -> tuple[int, ...]:
        """All nodes, each after those that it reads; of several that could be next, the lowest."""
        return _ordered(self.edges, self.num_nodes)


@dataclass(frozen=True, slots=True)
class Found:
    """The best graph that was found, and what as many random graphs came to.

    random_value: None where every graph was tried.
    """

    dag: Dag
    value: float
    method: Literal["exact", "swarm"]
    evaluations: int  # distinct graphs that `method` asked the value of
    random_value: float | None


def decode(matrix: Tensor, trees: bool = False) -> Dag:
    """The DAG of a matrix (N, N), deterministic; of equals the lowest node. trees: one edge a node, to its likeliest.

    G-decode with argmax: the end is the node of least out-degree (its row's sum); then the remaining node of
    largest out-degree is added, with an edge to each chosen node whose share of its row over the chosen is at
    least the mean. Only ratios count; the diagonal is ignored, and what is below 0 counts as 0. Raises ValueError
    if the matrix is not square or not finite.
    """
    return _grown(_rows(matrix), _likeliest, _one if trees else _at_least_mean)


def sample(matrix: Tensor, generator: Generator) -> Dag:
    """A random DAG of a matrix (N, N): G-decode by sampling with top-p at 1.

    As `decode`, but the end is drawn in proportion to the inverse out-degree, the next node in proportion to the
    out-degree, and each edge with the probability of its share. A node that drew none gets its likeliest.
    """
    pick = functools.partial(_drawn, generator=generator)
    return _grown(_rows(matrix), pick, functools.partial(_drawn_edges, generator=generator))


def all_dags(num_nodes: int) -> Iterator[Dag]:
    """Every labelled DAG with one node without successors: 1, 2, 15, 316 for 1 to 4 nodes (OEIS A003025).

    Raises ValueError beyond four nodes. Goes through 3^(N(N-1)/2) orientations.
    """
    if not 1 <= num_nodes <= MAX_ENUMERATED:
        raise ValueError(f"num_nodes: {num_nodes} graphs are not enumerated; allowed are 1 to {MAX_ENUMERATED}")
    pairs = itertools.combinations(range(num_nodes), 2)
    for choice in itertools.product(*[((), (pair,), (pair[::-1],)) for pair in pairs]):
        edges = frozenset(itertools.chain(*choice))
        ends = _ends(edges, num_nodes)
        if len(ends) == 1 and len(_ordered(edges, num_nodes)) == num_nodes:
            yield Dag(edges, ends[0], num_nodes)


def find_graph(
    utility: Callable[[Dag], float], num_nodes: int, budget: int, seed: int, trees: bool = True
) -> Found:
    """The graph of largest utility, as far as it can be found.

    Up to four nodes all graphs are tried, at most 316, whatever the budget. Beyond, a swarm over flattened
    matrices asks the utility of at most `budget` distinct graphs. Random search over as many stands beside it, so
    that it shows where the swarm is worth nothing. Each graph's utility is asked once in all: at most 2 * budget
    calls. trees: search among graphs in which every node is read by one other; five nodes have 625 of these and
    16,885 in all, of which 100 tries find the best in half of the runs and in a fifth.
    """
    known = functools.cache(utility)
    if num_nodes <= MAX_ENUMERATED:
        return _best_of_all(known, num_nodes)
    return _best_by_swarm(known, num_nodes, budget, seed, trees)


def importance(
    utility_of: Callable[[Sequence[int]], float], num_models: int, num_nodes: int, num_draws: int, seed: int
) -> Tensor:
    """(num_models,) float64, the JFK-score: the mean utility of assignments, weighted by a model's share in them.

    score_i = sum_j count_ij * u_j / sum_j count_ij (Heterogeneous Swarms) over `num_draws` assignments of a model
    to each node, drawn evenly with replacement; count_ij says how often model i stands in assignment j.
    utility_of: takes each node's model, asked once an assignment. nan for a model that was never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_models, (num_draws, num_nodes), generator=generator)  # (J, N)
    known = functools.cache(utility_of)
    utilities = torch.tensor([known(tuple(models)) for models in drawn.tolist()], dtype=torch.float64)  # (J,)
    counts = torch.nn.functional.one_hot(drawn, num_models).sum(dim=1).double()  # (J, M)
    return (utilities @ counts) / counts.sum(dim=0)


def _best_of_all(utility: Callable[[Dag], float], num_nodes: int) -> Found:
    values = {dag: utility(dag) for dag in all_dags(num_nodes)}
    best = max(values, key=values.__getitem__)
    return Found(best, values[best], "exact", len(values), None)


def _best_by_swarm(utility: Callable[[Dag], float], num_nodes: int, budget: int, seed: int, trees: bool) -> Found:
    size = num_nodes * num_nodes

    def graph(point: Tensor) -> Dag:
        return decode(point.view(num_nodes, num_nodes), trees)

    def evaluate(points: Tensor) -> Tensor:
        return torch.tensor([utility(graph(point)) for point in points], dtype=torch.float64)

    found = swarm_search(evaluate, size, budget, seed, graph)
    drawn = random_search(evaluate, functools.partial(uniform, _BATCH, size), graph, found.num_evaluations, seed)
    return Found(graph(found.point), found.value, "swarm", found.num_evaluations, drawn.value)


def _ends(edges: frozenset[Edge], num_nodes: int) -> list[int]:
    """The nodes without successors."""
    return sorted(set(range(num_nodes)) - {source for source, _ in edges})


def _ordered(edges: frozenset[Edge], num_nodes: int) -> tuple[int, ...]:
    """A topological order (Kahn's); it lacks the nodes that are in a circle or behind one."""
    ahead = set(range(num_nodes))
    order: list[int] = []
    while ready := ahead - {target for source, target in edges if source in ahead}:
        order.append(min(ready))
        ahead.remove(order[-1])
    return tuple(order)


def _rows(matrix: Tensor) -> list[_Row]:
    """The off-diagonal entries as numbers from 0 to 1; scaled, so that sums of huge ones stay finite."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"a graph's matrix is square; got shape {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("a graph's matrix has entries that are not finite")
    weights = matrix.double().clamp(min=0).fill_diagonal_(0)
    rows: list[_Row] = (weights / (weights.max() or 1.0)).tolist()
    return rows


def _grown(rows: list[_Row], pick: Callable[[_Row], int], connect: Callable[[_Row], list[int]]) -> Dag:
    """G-decode. pick: an index from weights; connect: one or more of them."""
    degrees = [math.fsum(row) for row in rows]
    end = pick(_inverse(degrees))
    chosen, edges = [end], set[Edge]()
    remaining = [node for node in range(len(rows)) if node != end]
    while remaining:
        node = remaining.pop(pick([degrees[other] for other in remaining]))
        edges |= {(node, chosen[index]) for index in connect([rows[node][other] for other in chosen])}
        chosen.append(node)
    return Dag(frozenset(edges), end, len(rows))


def _inverse(degrees: _Row) -> _Row:
    """In proportion to 1 / degree; nodes without out-degree leave nothing to the others."""
    least = min(degrees)
    return [least / degree if least else float(degree == 0) for degree in degrees]


def _shares(weights: _Row) -> _Row:
    """Normalised; equal where there is nothing to normalise."""
    total = math.fsum(weights)
    return [weight / total if total else 1 / len(weights) for weight in weights]


def _likeliest(weights: _Row) -> int:
    return weights.index(max(weights))


def _drawn(weights: _Row, generator: Generator) -> int:
    shares = torch.tensor(_shares(weights), dtype=torch.float64)
    return int(torch.multinomial(shares, 1, generator=generator))


def _one(weights: _Row) -> list[int]:
    return [_likeliest(weights)]


def _at_least_mean(weights: _Row) -> list[int]:
    """Never empty, the largest is at least the mean: `fsum` rounds once, so equal weights compare as equal."""
    total = math.fsum(weights)
    return [index for index, weight in enumerate(weights) if weight * len(weights) >= total]


def _drawn_edges(weights: _Row, generator: Generator) -> list[int]:
    chances = uniform(1, len(weights), generator)[0].tolist()
    drawn = [index for index, share in enumerate(_shares(weights)) if chances[index] < share]
    return drawn or [_likeliest(weights)]

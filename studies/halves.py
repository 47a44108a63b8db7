"""The development tasks in two halves: weights are tuned on even documents, every figure is of odd ones.

What members said of the documents comes from the store of `unisono evaluate` (collected once, in minutes). Tuning
looks at a spread of the even half's shared positions: the optimum is flat, and where main speaks alone weights change
nothing. Does not know fusions, matrices or tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ledger import ROOT
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.journal import Journal, Values
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.offline import FusedPositions, SharedPositions, fuse_positions, shared_positions
from ensemble_core.evaluation.scores import Scores, join_scores
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.tasks import Item, Split, Task, load_task
from ensemble_core.evaluation.weights import Weights, minimise
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.home import home
from ensemble_core.members.loading.checkpoints import resolve_folder
from ensemble_core.transfer.embeddings import load_embeddings
from ensemble_core.transfer.matrix import common_anchors
from studies.anchor_search import Search, Searcher, Similarity, fewer

DATA = ROOT.parent / "shared" / "data"
CACHE = home() / "benchmarks"
ENSEMBLES = ("duet", "duet-smollm2")  # the pair, each member main once
NAMES = ("arc_challenge", "piqa", "gsm8k", "triviaqa", "nq")


@dataclass(frozen=True, slots=True)
class Half:
    """Every other document of each task. limit: at most so many of a task."""

    bench: Workbench
    tasks: Sequence[Task]
    members: tuple[str, ...]
    split: Split
    limit: int | None = None

    def items(self, task: Task) -> tuple[Item, ...]:
        """A task's items of this half."""
        return Selection(self.split, self.limit).items(task)

    def plain(self, task: Task) -> Scores:
        """What members say of a task's records as documents."""
        return self._scores(measures.documents(task, self.items(task)), task)

    def options(self, task: Task) -> Scores:
        """What members say of each option behind its question."""
        return self._scores(measures.option_documents(task, self.items(task), ""), task)

    def everything(self) -> Scores:
        """All tasks' documents behind one another."""
        return join_scores([self.plain(task) for task in self.tasks])

    def _scores(self, documents: Sequence[Document], task: Task) -> Scores:
        return self.bench.scores(documents, self.members, f"{task.name}, {self.split}")

    def measured(self, recipe: Recipe, task: Task) -> dict[int, Values]:
        """Index of the record -> bits, and for a choice whether the likeliest option is right."""
        items = self.items(task)
        found = measures.bits(self.bench.sums(self.plain(task), recipe), items)
        if task.kind != "choice":
            return found
        right = measures.choices(self.bench.sums(self.options(task), recipe), items)
        return {index: {**found.get(index, {}), **right.get(index, {})} for index in found | right}


@dataclass(frozen=True, slots=True)
class Positions:
    """Shared positions of some documents whose next token is scored, at which fusions are compared."""

    scores: Scores
    members: tuple[str, ...]  # main first
    shared: SharedPositions
    num_candidates: int

    def fused(self, recipe: Recipe) -> FusedPositions:
        """What a fusion makes of them."""
        return fuse_positions(self.scores, recipe, self.shared, self.num_candidates)

    def nats(self, recipe: Recipe) -> Tensor:
        """-log p of each true next token, (P,) float64."""
        return -self.fused(recipe).logprobs.double()

    @property
    def main_nats(self) -> Tensor:
        """The same of main alone, (P,) float64."""
        return -self.scores.members[self.members[0]].logprob[self.shared.rows].double()

    @property
    def documents(self) -> Tensor:
        """The document of each position, (P,) int64."""
        return self.scores.members[self.members[0]].document[self.shared.rows].long()

    def tuned(self, recipe: Recipe, search: Callable[[Callable[[Weights], float]], Weights]) -> Recipe:
        """The recipe with the weights that `search` finds for its mean nats here."""
        return replace(
            recipe,
            weights=search(lambda weights: float(self.nats(replace(recipe, weights=weights)).mean())),
        )


def positions(
    scores: Scores, members: tuple[str, ...], num_candidates: int, limit: int | None = None
) -> Positions:
    """All scored shared positions, or `limit` of them, evenly spread."""
    shared = shared_positions(scores, members)
    kept = scores.members[members[0]].scored[shared.rows].nonzero().squeeze(1)
    chosen = SharedPositions(shared.rows[kept], [slots[kept] for slots in shared.slots])
    return Positions(scores, members, chosen.spread(limit or len(kept)), num_candidates)


def over_simplex(start: Weights) -> Callable[[Callable[[Weights], float]], Weights]:
    """The product's own search, to a hundredth."""
    return lambda objective: minimise(objective, start)


def over_grid(mains: Sequence[float]) -> Callable[[Callable[[Weights], float]], Weights]:
    """The best of a few weights of main; two members."""
    return lambda objective: min(((main, 1.0 - main) for main in mains), key=objective)


def load_tasks(folder: Path) -> list[Task]:
    """The development tasks; records that do not fit are left out with a warning."""
    return [load_task(name, folder / f"{name}_dev.jsonl", skip_bad=True) for name in NAMES]


def searches(
    bench: Workbench,
    members: Sequence[str],
    named: Mapping[str, Tensor],
    similarity: Similarity,
    cache: Path,
    num_anchors: int | None = None,
) -> list[Search]:
    """Each member's nearest anchors among those that all `members` share, or among `num_anchors` of them.

    named: the tokens that have to have a row, see `named_tokens`.
    """
    anchors = common_anchors([bench.vocabularies[name] for name in sorted(members)])
    if num_anchors is not None:
        anchors = fewer(anchors, num_anchors)
    folder = cache.expanduser() / "searches"
    return [_searcher(bench, name, folder, named[name]).search(similarity, anchors) for name in members]


def _searcher(bench: Workbench, member: str, folder: Path, wanted: Tensor) -> Searcher:
    source = bench.config.members[member]
    embeddings = partial(load_embeddings, resolve_folder(source))
    return Searcher(member, bench.vocabularies[member], embeddings, folder, wanted)


def named_tokens(halves: Sequence[Half]) -> dict[str, Tensor]:
    """Every token that a member has among its candidates anywhere: half of Gemma's never come up."""
    every = join_scores([half.plain(task) for half in halves for task in half.tasks])
    return {name: torch.unique(part.candidates.token_ids) for name, part in every.members.items()}


def journal_of(
    cache: Path, benchmark: str, bench: Workbench, tasks: Sequence[Task], made_from: Mapping[str, Any]
) -> Journal:
    """Finished parts of a benchmark, found again only for the same settings, tasks and sources of the fusions."""
    state = {
        **made_from,
        "config": bench.config.model_dump(mode="json"),
        "tasks": [[task.name, task.digest] for task in tasks],
        "sources": _sources(),
    }
    digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Journal(cache.expanduser() / f"{benchmark}.{digest}", {}, resume=True)


def _sources() -> str:
    """sha256 over what turns stored scores into figures."""
    digest = hashlib.sha256()
    for folder in ("fusion", "evaluation"):
        for path in sorted((ROOT / "ensemble_core" / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()

"""What members could gain by meeting in bytes or in a common vocabulary, against fusions over main's tokens.

    python -m studies.bytes_and_common [--part pools|steps|covers] [--tasks NAME ...] [--weight W] [--quick]

pools: bits per byte of the odd documents, weights tuned on the even ones: fusions of candidates as served, pools that
split an assistant's mass as main does (`split_pool.py`), and the mixture of whole stretches between shared places,
which is what bytes or common tokens come to with carried weights (`stretches.py`); by kinds of stretches, too.
steps: fewer of these documents, symbol by symbol with whole distributions: one weight at every byte or common token,
and what bytes are worth at positions where main is alone today. covers: what a member's own spelling leaves out of an
exact byte distribution. Each part keeps its rows, so that parts can be run apart.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ledger import Findings, TableRow, arguments, results_folder
from ensemble_core.config_file import load_config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.bootstrap import Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.offline import fuse_positions, shared_positions
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.tasks import Split
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fusion.base import Fusion, FusionSpace
from studies import byte_steps
from studies.fusion_table import NUM_TUNED_ON, shown
from studies.halves import CACHE, DATA, ENSEMBLES, NAMES, Half, load_tasks, over_simplex, positions
from studies.reduced_pair import ReducedPair
from studies.split_pool import SplitPool, common_groups, common_places, piece_groups
from studies.stretches import Stretches, fused_nats, shared_starts, stretches

PARTS = ("pools", "steps", "covers")
PROJECTION, EXACT = "projection", "projection, exact where spelt alike"
MIXTURE, BEST = "bytes or common tokens, weights carried", "the likelier member of each stretch"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run. documents: of a task and half; heard: of these in whole distributions; covered: stretches."""

    documents: int = 64
    heard: int = 16
    covered: int = 200


QUICK = Plan(documents=2, heard=2, covered=4)


@dataclass(frozen=True, slots=True)
class Pool:
    """One way to fuse. nats: (S,) of each stretch of the odd half; weight: of the member that is main, if any."""

    label: str
    main: str
    weight: float | None
    nats: Tensor


class Pools:
    """All pools over one pair, from stored scores. weight: of the first member in all pools; None: each is tuned."""

    def __init__(
        self, bench: Workbench, pair: ReducedPair, half: Callable[[Split], Half], weight: float | None
    ) -> None:
        self._bench, self._pair, self._half, self._weight = bench, pair, half, weight

    @cached_property
    def _odd(self) -> Scores:
        return self._half("odd").everything()

    @cached_property
    def _even(self) -> Scores:
        return self._half("even").everything()

    @cached_property
    def odd(self) -> Stretches:
        """The stretches that figures are of, columns in the order of the pair."""
        return stretches(self._odd, self._pair.members)

    def alone(self) -> list[Pool]:
        """Members by themselves."""
        return [Pool("alone", name, None, -self.odd.logprobs[:, i]) for i, name in enumerate(self._pair.members)]

    def mixed(self) -> list[Pool]:
        """Whole stretches: no member is main."""
        weights = stretches(self._even, self._pair.members).tuned()
        return [
            Pool(MIXTURE, "-", weights[0], self.odd.nats(weights)),
            Pool(BEST, "-", None, self.odd.best_nats()),
        ]

    def fused(self, ensemble: str) -> list[Pool]:
        """Fusions at shared places, main alone elsewhere."""
        served = {name: f"{ensemble}?fusion={name}" for name in (PROJECTION, "relative")}
        recipes = {name: self._bench.recipe(parse_variant(query)) for name, query in served.items()}
        plain = recipes[PROJECTION]
        recipes |= {name: replace(plain, fusion=fusion) for name, fusion in self._splits(plain).items()}
        pools = [self._pool(name, recipe) for name, recipe in recipes.items()]
        return [pools[0], self._exact(pools[0]), *pools[1:]]

    def _splits(self, recipe: Recipe) -> dict[str, Fusion]:
        main, assistant = recipe.members
        vocabularies = [self._bench.vocabularies[name] for name in recipe.members]
        space = FusionSpace(vocabularies, list, torch.device("cpu"), recipe.members)
        common = self._pair.common
        places = common_places(common[assistant], common[main])
        return {
            "common tokens, one step": SplitPool(space, common_groups(common[main]), places),
            "assistant's pieces, one step": SplitPool(space, piece_groups(*vocabularies)),
        }

    def _pool(self, label: str, recipe: Recipe) -> Pool:
        num = self._bench.num_candidates
        tuned = positions(self._even, recipe.members, num, NUM_TUNED_ON).tuned(
            recipe, over_simplex(recipe.weights)
        )
        shared = shared_positions(self._odd, recipe.members)
        fused = fuse_positions(self._odd, tuned, shared, num)
        starts = shared_starts(self._odd, recipe.members)
        return Pool(
            label, recipe.main, tuned.weights[0], fused_nats(self._odd, recipe.main, shared, fused, starts)
        )

    def _tuned(self, recipe: Recipe) -> Recipe:
        if self._weight is None:
            few = positions(self._even, recipe.members, self._bench.num_candidates, NUM_TUNED_ON)
            return few.tuned(recipe, over_simplex(recipe.weights))
        first = self._weight if recipe.main == self._pair.members[0] else 1 - self._weight
        return replace(recipe, weights=(first, 1 - first))

    def _exact(self, pool: Pool) -> Pool:
        """Without what candidates cost: where both members spell a stretch as one token, the exact linear pool."""
        assert pool.weight is not None
        first = pool.main == self._pair.members[0]
        weights = (pool.weight, 1 - pool.weight) if first else (1 - pool.weight, pool.weight)
        alike = (self.odd.num_tokens == 1).all(dim=1)
        return replace(pool, label=EXACT, nats=torch.where(alike, self.odd.nats(weights), pool.nats))

    def ratio(self, nats: Tensor) -> Ratio:
        """Bits over bytes, by document."""
        kept = self._odd.num_bytes > 0
        return Ratio(self.odd.summed(nats / math.log(2))[kept], self._odd.num_bytes.double()[kept])


def pool_rows(pools: Pools, found: Sequence[Pool]) -> list[TableRow]:
    """Bits per byte, and what each differs by from the projections of the same main (of the first one)."""
    rows: list[TableRow] = []
    for pool in found:
        ratio = pools.ratio(pool.nats)
        counts = draws(len(ratio.numerators))
        value = interval(ratio, counts)
        row = {
            "main": pool.main,
            "pool": pool.label,
            "weight": pool.weight,
            "bits per byte": f"{value.value:.4f} ({value.low:.4f} .. {value.high:.4f})",
        }
        for label in (PROJECTION, "relative", EXACT):
            own = next((p for p in found if p.label == label and pool.main in (p.main, "-")), None)
            same = own is None or own is pool
            row[f"against {label}"] = (
                "-" if same else shown(paired_interval(ratio, pools.ratio(own.nats), counts))  # type: ignore[union-attr]
            )
        rows.append(row)
    return rows


def kind_rows(pools: Pools, found: Sequence[Pool], members: Sequence[str]) -> list[TableRow]:
    """Bits per byte of all text that lie in stretches of each kind, and how many there are."""
    single = pools.odd.num_tokens == 1
    first, second = members
    kinds = {
        "one token each": single.all(dim=1),
        f"one of {first}, several of {second}": single[:, 0] & ~single[:, 1],
        f"several of {first}, one of {second}": ~single[:, 0] & single[:, 1],
        "several each": ~single.any(dim=1),
    }
    rows: list[TableRow] = [
        {"main": "", "pool": "share of stretches, %"}
        | {kind: round(100 * float(inside.double().mean()), 2) for kind, inside in kinds.items()}
    ]
    for pool in found:
        parts = {kind: f"{pools.ratio(pool.nats * inside).value:.4f}" for kind, inside in kinds.items()}
        rows.append({"main": pool.main, "pool": pool.label} | parts)
    return rows


def measure(args: argparse.Namespace, plan: Plan) -> Findings:
    """The parts asked for; the others as they were kept."""
    kept = results_folder("studies", args.quick) / "bytes_and_common.json"
    tables = dict(json.loads(kept.read_text())["tables"]) if kept.exists() and not args.quick else {}
    tasks = [task for task in load_tasks(args.data) if task.name in args.tasks]
    with Workbench(load_config(args.config)) as bench:
        pair = ReducedPair.of(bench, ENSEMBLES[0], args.cache)

        def half(split: Split, limit: int) -> Half:
            return Half(bench, tasks, tuple(sorted(bench.config.members)), split, limit)

        if "pools" in args.part:
            pools = Pools(bench, pair, lambda split: half(split, plan.documents), args.weight)
            tables |= _pools(pools, pair.members)
        listened = {split: half(split, plan.heard) for split in ("even", "odd")}
        if "steps" in args.part:
            tables["steps"], tables["alone"] = byte_steps.steps(pair, listened)
        if "covers" in args.part:
            tables["covers"] = byte_steps.covers(pair, listened["odd"], plan.covered)
    settings = {
        "quick": args.quick,
        "tasks": " ".join(args.tasks),
        "documents of a task and half": plan.documents,
        "weights of pools": "tuned" if args.weight is None else args.weight,
        "heard": plan.heard,
        "common tokens": len(pair.strings),
        "shared tokens": pair.num_shared,
    }
    return Findings("bytes_and_common", tables, settings=settings)


def _pools(pools: Pools, members: Sequence[str]) -> Mapping[str, list[TableRow]]:
    found = [*pools.alone(), *pools.fused(ENSEMBLES[0]), *pools.fused(ENSEMBLES[1]), *pools.mixed()]
    return {"pools": pool_rows(pools, found), "kinds": kind_rows(pools, found, members)}


def main() -> None:
    """Measure, tell, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of what was heard")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES, help="of the development tasks")
    parser.add_argument("--limit", type=int, default=Plan().documents, help="documents of a task and half")
    parser.add_argument("--heard", type=int, default=Plan().heard, help="of these in whole distributions")
    parser.add_argument("--weight", type=float, help="the first member's in all pools, in place of tuned ones")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    args = parser.parse_args()
    args.part = args.part or PARTS
    measure(args, QUICK if args.quick else Plan(args.limit, args.heard)).print()


if __name__ == "__main__":
    main()

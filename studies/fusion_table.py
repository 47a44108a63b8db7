"""What each fusion is worth: bits per byte and accuracy of the demo pair, both ways, against its better member.

    python -m studies.fusion_table [--config configs/demo.yaml] [--data ../shared/data] [--quick]

Every model is scored on the odd documents of the five development tasks; each fusion's weights are tuned on the even
ones. A member alone is scored over the same bytes in its own tokens, and the better one is the one to beat. Accuracy
is that of the likeliest option of the odd ARC and PIQA questions. Intervals are 95 %, over documents, differences
paired. What is finished is kept in the cache under the digest of what it was made from, so a run that was cut off
goes on. Prints tables and then one JSON line; writes studies/results/fusion_table.png.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ledger import Check, Findings, Value, arguments, results_folder
from ensemble_core.config_file import load_config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, paired_interval
from ensemble_core.evaluation.journal import Journal, Values
from ensemble_core.evaluation.report import POOLED, Result, summarise
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.tune import rounded
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fusion.base import FUSIONS, FusionSpace, build_fusion
from ensemble_core.fusion.mapping import token_map
from ensemble_core.transfer.rows import RowRecipe
from studies.anchor_search import refusal
from studies.halves import (
    CACHE,
    DATA,
    ENSEMBLES,
    Half,
    Positions,
    journal_of,
    load_tasks,
    named_tokens,
    over_simplex,
    positions,
    searches,
)

RELATIVE, PROJECTION = "relative, EM", "projection, linear"
PAPER = "relative, deepen rows, search"
CONTRASTIVE = "contrastive, alpha"
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# name -> what `unisono evaluate --model ENSEMBLE?...` takes
VARIANTS = {
    RELATIVE: "fusion=relative",
    "relative, search": "fusion=relative&options.solver=search",
    PROJECTION: "fusion=projection",
    "projection, log-linear": "fusion=projection&options.pool=log-linear",
    "union": "fusion=union",
    "gac": "fusion=gac",
    "eva": "fusion=eva",
    "core, projection": "fusion=core&options.base.name=projection",
    "core, projection, token level": "fusion=core&options.base.name=projection&options.level=token",
    "core, projection, entropy only": "fusion=core&options.base.name=projection&options.mode=entropy-only",
    "core, relative": "fusion=core&options.base.name=relative",
}
NUM_TUNED_ON = 2000  # shared positions of the even half that weights are tuned on


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the table. recipe: before its weights are tuned."""

    label: str  # unique
    fusion: str
    recipe: Recipe

    @property
    def has_weights(self) -> bool:
        """Members alone and contrastive fusions have none."""
        return len(self.recipe.members) > 1 and not self.fusion.startswith(CONTRASTIVE)


class Table:
    """Measures entries, each once, and keeps what was measured."""

    def __init__(self, bench: Workbench, tasks: Sequence[Task], journal: Journal, limit: int | None) -> None:
        members = tuple(sorted(bench.config.members))
        self.bench = bench
        self._tasks = tasks
        self._odd = Half(bench, tasks, members, "odd", limit)
        self._even = Half(bench, tasks, members, "even", limit)
        self._journal = journal

    def measured(self, entry: Entry) -> Entry:
        """The entry as tuned, when all of it is in the journal."""
        entry = replace(entry, recipe=self._tuned(entry))
        for task in self._tasks:
            if not self._journal.items((entry.label, task.name, "all")):
                self._journal.add((entry.label, task.name, "all"), self._odd.measured(entry.recipe, task))
        return entry

    def _tuned(self, entry: Entry) -> Recipe:
        if not entry.has_weights:
            return entry.recipe
        key = (entry.label, "even half", "weights")
        if not self._journal.items(key):
            recipe = self._tuned_on(entry).tuned(entry.recipe, over_simplex(entry.recipe.weights))
            self._journal.add(key, {0: {"weights": list(rounded(recipe.weights))}})
        return replace(entry.recipe, weights=tuple(self._journal.items(key)[0]["weights"]))

    def _tuned_on(self, entry: Entry) -> Positions:
        return positions(self._even.everything(), entry.recipe.members, self.bench.num_candidates, NUM_TUNED_ON)

    def best(self, entries: Sequence[Entry]) -> Entry:
        """The one with the fewest nats on the even half, of entries without weights."""
        seen = self._tuned_on(entries[0])
        return min(entries, key=lambda entry: float(seen.nats(entry.recipe).mean()))

    def items(self, entry: Entry) -> dict[str, Mapping[int, Values]]:
        """Task -> index -> values."""
        return {task.name: self._journal.items((entry.label, task.name, "all")) for task in self._tasks}

    def named(self) -> dict[str, Tensor]:
        """Tokens that have to have a row in a matrix."""
        return named_tokens([self._even, self._odd])

    def odd_positions(self, members: tuple[str, ...]) -> Positions:
        """All shared positions that figures are of."""
        return positions(self._odd.everything(), members, self.bench.num_candidates)


def alone(bench: Workbench) -> list[Entry]:
    """Every member by itself."""
    return [Entry(name, "alone", bench.recipe(parse_variant(name))) for name in sorted(bench.config.members)]


def fusions(table: Table, ensemble: str) -> list[Entry]:
    """Every fusion of one ensemble, the contrastive one at its best strength."""
    main, assistant = table.bench.recipe(parse_variant(ensemble)).members
    roles = f"fusion=contrastive&options.expert={assistant}&options.base={main}&options.alpha"
    contrastive = {f"{CONTRASTIVE} {alpha}": f"{roles}={alpha}" for alpha in ALPHAS}
    named, steered = (
        [
            Entry(f"{ensemble}: {name}", name, table.bench.recipe(parse_variant(f"{ensemble}?{query}")))
            for name, query in queries.items()
        ]
        for queries in (VARIANTS, contrastive)
    )
    return [*named, table.best(steered)]


def papers_own(table: Table, ensemble: str, folder: Path) -> tuple[Entry, list[str]]:
    """The paper's recipe with the paper's solver, and what the builder says of such matrices."""
    bench, matrices = table.bench, table.bench.config.matrices
    plain = bench.recipe(parse_variant(ensemble))
    found = searches(bench, plain.members, table.named(), "deepen", folder)
    recipe = RowRecipe("deepen", found[0].columns.shape[1], 0.0)
    said = [refusal(m, s, recipe, matrices.min_retained) for m, s in zip(plain.members, found, strict=True)]
    space = FusionSpace(
        [bench.vocabularies[name] for name in plain.members],
        lambda: [search.matrix(matrices.top_k) for search in found],
        torch.device("cpu"),
        plain.members,
    )
    fusion = build_fusion("relative", FUSIONS.parse("relative", {"solver": "search"}, "fusion"), space)
    return Entry(f"{ensemble}: {PAPER}", PAPER, replace(plain, fusion=fusion)), said


def figure_row(entry: Entry, found: Mapping[str, Result], best: float) -> dict[str, Value]:
    """One line of the main table; best: bits per byte of the best member alone."""
    bits, right = found["bits_per_byte"], found["accuracy"]
    return {
        "main": entry.recipe.main,
        "fusion": entry.fusion,
        "weight of main": entry.recipe.weights[0] if entry.has_weights else None,
        "bits per byte": f"{bits.value.value:.4f}",
        "against the best member": shown(bits.difference),
        "%": f"{100 * (bits.value.value / best - 1):+.2f}",
        "accuracy": f"{right.value.value:.3f}",
        "against the best": shown(right.difference, 3),
    }


def shown(difference: Interval | None, digits: int = 4) -> str:
    """A difference with its interval."""
    if difference is None:
        return "-"
    return f"{difference.value:+.{digits}f} ({difference.low:+.{digits}f} .. {difference.high:+.{digits}f})"


def paired(items: Mapping[str, Mapping[int, Values]], other: Mapping[str, Mapping[int, Values]]) -> Interval:
    """Bits per byte of one model minus another's, over the same documents."""
    ratio, reference = _bits_per_byte(items), _bits_per_byte(other)
    return paired_interval(ratio, reference, draws(len(ratio.numerators)))


def _bits_per_byte(items: Mapping[str, Mapping[int, Values]]) -> Ratio:
    rows = [row for by_index in items.values() for _, row in sorted(by_index.items()) if "bits" in row]
    bits, size = (torch.tensor([float(row[name]) for row in rows]).double() for name in ("bits", "num_bytes"))
    return Ratio(bits, size)


def where_gained(seen: Positions, nats: Tensor, places: Tensor) -> dict[str, Value]:
    """Nats per shared position that a fusion gains on main alone, by where main's true token stands.

    places: (V_assistant,) its tokens as main's ids. The three add up to the whole gain.
    """
    main, assistant = (seen.scores.members[name].candidates for name in seen.members)
    true = seen.scores.members[seen.members[0]].token[seen.shared.rows].long().unsqueeze(1)
    own = (main.token_ids[seen.shared.slots[0]] == true).any(dim=1)
    other = (places[assistant.token_ids[seen.shared.slots[1]]] == true).any(dim=1) & ~own
    change = nats - seen.main_nats
    parts = {"among main's candidates": own, "only among the assistant's": other, "outside both": ~own & ~other}
    found: dict[str, Value] = {"all": f"{float(change.mean()):+.4f}"}
    return found | {
        name: f"{float((change * part).mean()):+.4f} ({float(part.double().mean()):.1%} of positions)"
        for name, part in parts.items()
    }


def task_row(entry: Entry, found: Mapping[str, Result], best: Mapping[str, float]) -> dict[str, Value]:
    """Per cent of bits per byte against the best member of the whole, task by task."""
    changes = {task: f"{100 * (result.value.value / best[task] - 1):+.2f}" for task, result in found.items()}
    return {"main": entry.recipe.main, "fusion": entry.fusion, **changes}


def draw(entries: Sequence[Entry], found: Mapping[str, Result], path: Path) -> None:
    """Differences to the best member with their intervals, a line a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 0.26 * len(entries) + 1.2), layout="constrained")
    for place, entry in enumerate(entries):
        if (difference := found[entry.label].difference) is not None:
            reach = [[difference.value - difference.low], [difference.high - difference.value]]
            panel.errorbar(difference.value, place, xerr=reach, fmt="o", color="C0", ms=4, capsize=2)
    panel.axvline(0, color="0.4", lw=1)
    panel.set_yticks(range(len(entries)), [f"{e.fusion} ({e.recipe.main})" for e in entries], fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="bits per byte against the best member alone, 95 % interval; to the left is better")
    panel.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything measured, as tables."""

    table: Table
    entries: Sequence[Entry]
    by_task: Mapping[tuple[str, str, str], Result]  # task, metric, label

    @classmethod
    def of(cls, table: Table, entries: Sequence[Entry]) -> Figures:
        """Summaries of all entries, in one go."""
        members = [entry.label for entry in entries if len(entry.recipe.members) == 1]
        report = summarise({entry.label: table.items(entry) for entry in entries}, members)
        return cls(table, entries, {(r.task, r.metric, r.model): r for r in report.results})

    def pooled(self, metric: str) -> dict[str, Result]:
        """Label -> over all tasks."""
        return {e.label: self.by_task[POOLED, metric, e.label] for e in self.entries}

    def best_member(self) -> str:
        """The member with the fewest bits per byte over all tasks."""
        return next(r.reference for r in self.pooled("bits_per_byte").values() if r.difference is not None)

    def main_rows(self) -> list[dict[str, Value]]:
        """One row a model."""
        bits, right = self.pooled("bits_per_byte"), self.pooled("accuracy")
        best = bits[self.best_member()].value.value
        return [
            figure_row(e, {"bits_per_byte": bits[e.label], "accuracy": right[e.label]}, best) for e in self.entries
        ]

    def task_rows(self) -> list[dict[str, Value]]:
        """Bits per byte by task."""
        own = {task: r for (task, metric, _), r in self.by_task.items() if metric == "bits_per_byte"}
        best = {task: self.by_task[task, "bits_per_byte", self.best_member()].value.value for task in own}
        return [
            task_row(e, {task: self.by_task[task, "bits_per_byte", e.label] for task in own}, best)
            for e in self.entries
        ]

    def against_projection(self) -> list[dict[str, Value]]:
        """Fusions in relative space minus the linear projection of the same ensemble."""
        rows: list[dict[str, Value]] = []
        for ensemble in dict.fromkeys(e.recipe.model for e in self.entries if len(e.recipe.members) > 1):
            own = {e.fusion: e for e in self.entries if e.recipe.model == ensemble}
            other = self.table.items(own[PROJECTION])
            for entry in (e for name, e in own.items() if "relative" in name):
                difference = paired(self.table.items(entry), other)
                rows.append(
                    {
                        "main": entry.recipe.main,
                        "fusion": entry.fusion,
                        "bits per byte against projection": shown(difference),
                    }
                )
        return rows

    def places(self) -> list[dict[str, Value]]:
        """Where relative and projection gain."""
        rows = []
        for entry in (e for e in self.entries if e.fusion in (RELATIVE, PROJECTION)):
            seen = self.table.odd_positions(entry.recipe.members)
            main, assistant = (self.table.bench.vocabularies[name] for name in entry.recipe.members)
            gained = where_gained(seen, seen.nats(entry.recipe), token_map(assistant, main))
            rows.append({"main": entry.recipe.main, "fusion": entry.fusion, **gained})
        return rows

    def checks(self) -> list[Check]:
        """What the product claims."""
        bits = self.pooled("bits_per_byte")
        best = bits[self.best_member()].value.value
        ensemble = min((r for r in bits.values() if r.difference is not None), key=lambda r: r.value.value)
        assert ensemble.difference is not None
        return [
            Check("best ensemble below the best member, %", 100 * (1 - ensemble.value.value / best), ">=", 2.5),
            Check("upper edge of its difference, bits per byte", ensemble.difference.high, "<=", 0.0),
        ]

    def tables(self, said: Sequence[str]) -> dict[str, Sequence[Mapping[str, Value]]]:
        """All of them by name. said: by the builder of the paper's rows."""
        return {
            "fusions": self.main_rows(),
            "by task": self.task_rows(),
            "against projection": self.against_projection(),
            "places": self.places(),
            "builder": [{"of the paper's recipe the builder says": line} for line in said if line],
        }


def measured(table: Table, ensembles: Sequence[str], cache: Path | None) -> tuple[list[Entry], list[str]]:
    """All entries, measured, and what the builder says of the paper's rows. cache: None leaves these out."""
    entries = [table.measured(entry) for entry in alone(table.bench)]
    said: list[str] = []
    for ensemble in ensembles:
        entries += [table.measured(entry) for entry in fusions(table, ensemble)]
    if cache is None:
        return entries, said
    for ensemble in ensembles:
        paper, said = papers_own(table, ensemble, cache)
        entries.append(table.measured(paper))
    return entries, said


def main() -> None:
    """Tune, measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of searches and of finished parts")
    parser.add_argument("--ensembles", nargs="+", default=ENSEMBLES, help="of the configuration, over the pair")
    parser.add_argument(
        "--without-paper", action="store_true", help="leave out its rows, which take minutes to find"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    limit = 4 if args.quick else None
    tasks = load_tasks(args.data)
    with Workbench(load_config(args.config)) as bench:
        made_from = {"limit": limit, "fusions": VARIANTS, "tuned on": NUM_TUNED_ON}
        table = Table(bench, tasks, journal_of(args.cache, "fusion_table", bench, tasks, made_from), limit)
        entries, said = measured(table, args.ensembles, None if args.without_paper or args.quick else args.cache)
        figures = Figures.of(table, entries)
        settings = {
            "quick": args.quick,
            "documents": len(_bits_per_byte(table.items(entries[0])).numerators),
            "shared positions": len(table.odd_positions(entries[-1].recipe.members).shared.rows),
            "weights tuned on": f"{NUM_TUNED_ON} shared positions of the even documents",
            "K": bench.num_candidates,
        }
        tables = figures.tables(said)
    draw(entries, figures.pooled("bits_per_byte"), results_folder("studies", args.quick) / "fusion_table.png")
    Findings("fusion_table", tables, figures.checks(), settings).print()


if __name__ == "__main__":
    main()

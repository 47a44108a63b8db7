"""Which relative space serves: similarity, temperature, row width, number of anchors, solver and its steps.

    python -m studies.relative_sweep [--config configs/demo.yaml] [--data ../shared/data] [--quick]

The demo pair both ways, on a fixed spread of shared positions: each point's weight of main is the best of a short
grid on even documents, its nats per position are of odd ones, with 95 % intervals over documents of the difference
to main alone, and of that to the linear projection with a weight found in the same way. One search for the nearest
anchors a member and similarity is kept in the cache (minutes the first time); every matrix follows from it. Finished
points are kept there, too, so a sweep that was cut off goes on. Prints tables and then one JSON line; writes
studies/results/relative_sweep.png.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ledger import Findings, TableRow, Value, arguments, results_folder
from ensemble_core.config_file import load_config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, paired_interval
from ensemble_core.evaluation.journal import Journal
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fusion.base import FUSIONS, Fusion, FusionSpace, build_fusion
from ensemble_core.transfer.matrix import TransferMatrix
from studies.anchor_search import Search, Similarity
from studies.halves import (
    CACHE,
    DATA,
    ENSEMBLES,
    Half,
    Positions,
    journal_of,
    load_tasks,
    named_tokens,
    over_grid,
    positions,
    searches,
)

WEIGHTS = {"gemma3": (0.95, 0.9, 0.8, 0.7, 0.6), "smollm2": (0.7, 0.55, 0.4, 0.3, 0.2)}  # of main, by main
TEMPERATURES = (5.0, 10.0, 20.0, 40.0, 80.0)
WIDTHS = (8, 16, 32, 64, 128)
NUM_TUNED_ON, NUM_POSITIONS = 1000, 3000


@dataclass(frozen=True, slots=True)
class Point:
    """One relative space and solver. anchors: None for all."""

    similarity: Similarity = "centred"
    tau: float = 20.0
    k: int = 32
    solver: str = "em"
    steps: int = 3
    eta: float = 0.15
    anchors: int | None = None

    @property
    def label(self) -> str:
        """Its name in the journal and in tables."""
        rows = self.similarity if self.similarity == "deepen" else f"{self.similarity} tau {self.tau:g}"
        solved = f"EM {self.steps}" if self.solver == "em" else f"search {self.steps}, eta {self.eta:g}"
        return f"{rows}, k {self.k}, {solved}" + (f", {self.anchors} anchors" if self.anchors else "")

    @property
    def options(self) -> dict[str, Any]:
        """Of the `relative` fusion."""
        own = {"solver": self.solver, "steps": self.steps}
        return own if self.solver == "em" else own | {"eta": self.eta}


def points() -> dict[str, list[Point]]:
    """Table -> its points: temperature by width, then one thing at a time."""
    wide = [Point(tau=tau, k=k) for tau in TEMPERATURES for k in WIDTHS]
    return {
        "temperature and width": wide,
        "steps of EM": [Point(tau=tau, steps=steps) for tau in (20.0, 80.0) for steps in (1, 3, 6)],
        "search": [
            Point(tau=tau, solver="search", steps=5, eta=eta) for tau in (20.0, 80.0) for eta in (0.15, 0.5, 2.0)
        ],
        "anchors": [Point(tau=tau, anchors=num) for num in (4096, 16384) for tau in (20.0, 80.0)],
        "without centring": [Point("uncentred", tau=tau) for tau in TEMPERATURES],
        "the paper's rows": [
            *(Point("deepen", k=k) for k in (32, 128)),
            *(Point("deepen", k=k, solver="search", steps=5) for k in (32, 128)),
        ],
    }


@dataclass(frozen=True, slots=True)
class Sample:
    """The positions of one ensemble: where weights are tuned, and where figures are taken."""

    plain: Recipe
    tuned_on: Positions
    reported: Positions

    def measured(self, recipe: Recipe) -> dict[str, Any]:
        """The weight of main that the even half prefers, and nats at each reported position."""
        recipe = self.tuned_on.tuned(recipe, over_grid(WEIGHTS[recipe.main]))
        nats = self.reported.nats(recipe)
        return {"weight": recipe.weights[0], "nats": [round(x, 6) for x in nats.tolist()]}


class Sweep:
    """Measures points, each once."""

    def __init__(
        self,
        bench: Workbench,
        samples: Mapping[str, Sample],
        named: Mapping[str, Tensor],
        journal: Journal,
        cache: Path,
    ) -> None:
        self._bench = bench
        self._named = named
        self._samples = samples
        self._journal = journal
        self._cache = cache
        self._searches: dict[tuple[Any, ...], list[Search]] = {}

    def projection(self, ensemble: str) -> Mapping[str, Any]:
        """The baseline."""
        recipe = self._bench.recipe(parse_variant(f"{ensemble}?fusion=projection"))
        return self._once(ensemble, "projection", lambda: recipe)

    def point(self, ensemble: str, point: Point) -> Mapping[str, Any]:
        """A point's weight and nats."""
        return self._once(ensemble, point.label, lambda: self._recipe(self._samples[ensemble].plain, point))

    def _once(self, ensemble: str, label: str, recipe: Callable[[], Recipe]) -> Mapping[str, Any]:
        key = (ensemble, "odd half", label)
        if not self._journal.items(key):
            self._journal.add(key, {0: self._samples[ensemble].measured(recipe())})
        return self._journal.items(key)[0]

    def _recipe(self, plain: Recipe, point: Point) -> Recipe:
        matrices = [search.matrix(point.k, self._temperature(point)) for search in self._searched(plain, point)]
        return replace(plain, fusion=relative(self._bench, plain.members, matrices, point.options))

    def _temperature(self, point: Point) -> float:
        return 1.0 if point.similarity == "deepen" else point.tau

    def _searched(self, plain: Recipe, point: Point) -> list[Search]:
        key = (plain.members, point.similarity, point.anchors)
        if key not in self._searches:
            found = searches(self._bench, plain.members, self._named, point.similarity, self._cache, point.anchors)
            self._searches = {key: found}  # one space at a time
        return self._searches[key]


def relative(
    bench: Workbench, members: tuple[str, ...], matrices: Sequence[TransferMatrix], options: dict[str, Any]
) -> Fusion:
    """The relative fusion of these members with these matrices."""
    vocabularies = [bench.vocabularies[name] for name in members]
    space = FusionSpace(vocabularies, lambda: matrices, torch.device("cpu"), members)
    return build_fusion("relative", FUSIONS.parse("relative", options, "fusion"), space)


def samples(bench: Workbench, halves: Sequence[Half], quick: bool) -> dict[str, Sample]:
    """Even and odd positions of both ensembles. halves: even, odd."""
    even, odd = (half.everything() for half in halves)
    tuned_on, reported = (50, 100) if quick else (NUM_TUNED_ON, NUM_POSITIONS)
    found = {}
    for ensemble in ENSEMBLES:
        plain = bench.recipe(parse_variant(ensemble))
        found[ensemble] = Sample(
            plain,
            positions(even, plain.members, bench.num_candidates, tuned_on),
            positions(odd, plain.members, bench.num_candidates, reported),
        )
    return found


def difference(seen: Positions, nats: Tensor, other: Tensor) -> Interval:
    """Mean nats per position minus another model's, documents drawn."""
    ratio, reference = _per_document(seen, nats), _per_document(seen, other)
    return paired_interval(ratio, reference, draws(len(ratio.numerators)))


def _per_document(seen: Positions, nats: Tensor) -> Ratio:
    place = torch.unique(seen.documents, return_inverse=True)[1]
    empty = torch.zeros(int(place.max()) + 1, dtype=torch.float64)
    return Ratio(empty.index_add(0, place, nats), empty.index_add(0, place, torch.ones_like(nats)))


def row(sample: Sample, point: Point | None, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    """One line. point: None for the projection. found: label -> weight and nats."""
    seen, own = sample.reported, found[point.label if point else "projection"]
    nats, baseline = (torch.tensor(each["nats"]).double() for each in (own, found["projection"]))
    gain, lead = difference(seen, nats, seen.main_nats), difference(seen, nats, baseline)
    return {
        "main": sample.plain.main,
        "rows": point.similarity if point else "(projection)",
        "tau": f"{point.tau:g}" if point and point.similarity != "deepen" else None,
        "k": point.k if point else None,
        "anchors": (point.anchors or "all") if point else None,
        "solver": _solver(point) if point else None,
        "weight of main": f"{own['weight']:.2f}",
        "nats": f"{float(nats.mean()):.4f}",
        "against main alone": _shown(gain),
        "against projection": _shown(lead) if point else None,
    }


def _solver(point: Point) -> str:
    return f"EM {point.steps}" if point.solver == "em" else f"search {point.steps}, eta {point.eta:g}"


def _shown(found: Interval) -> str:
    return f"{found.value:+.4f} ({found.low:+.4f} .. {found.high:+.4f})"


def draw(rows: Mapping[str, Sequence[TableRow]], path: Path) -> None:
    """Small multiples: a panel for each main and kind of point; lower is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mains = list(dict.fromkeys(str(each["main"]) for each in rows["baseline"]))
    lines = {"temperature and width": ("k", "tau"), "steps of EM": ("solver", "tau"), "search": ("solver", "tau")}
    figure, panels = pyplot.subplots(
        len(mains), 3, figsize=(13, 4 * len(mains)), layout="constrained", sharey="row"
    )
    for across, main in zip(panels, mains, strict=True):
        for panel, (name, (x, line)) in zip(
            across, [each for each in lines.items() if each[0] in rows], strict=False
        ):
            _panel(panel, [each for each in rows[name] if each["main"] == main], x, line)
            baseline = next(each for each in rows["baseline"] if each["main"] == main)
            panel.axhline(float(str(baseline["nats"])), color="0.3", ls=":", label="projection")
            panel.set(title=f"{main} is main: {name}", xlabel=x)
            panel.legend(frameon=False, fontsize=7)
        across[0].set_ylabel("nats per shared position")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[TableRow], x: str, line: str) -> None:
    for value in dict.fromkeys(each[line] for each in rows):
        mine = [each for each in rows if each[line] == value]
        panel.plot(
            [str(each[x]) for each in mine],
            [float(str(each["nats"])) for each in mine],
            "o-",
            label=f"{line} {value}",
        )
    panel.grid(alpha=0.3)
    panel.tick_params(axis="x", labelsize=7)


def quick_points() -> dict[str, list[Point]]:
    """A point a table, without a search over all anchors."""
    return {name: [replace(each[0], anchors=64)] for name, each in points().items()}


def measure(sweep: Sweep, chosen: Mapping[str, Sequence[Point]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Ensemble -> label -> weight and nats; points of one space behind one another, so that it is loaded once."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {
        ensemble: {"projection": sweep.projection(ensemble)} for ensemble in ENSEMBLES
    }
    todo = [(ensemble, point) for every in chosen.values() for ensemble in ENSEMBLES for point in every]
    for ensemble, point in tqdm(todo, desc="points", disable=None):
        found[ensemble][point.label] = sweep.point(ensemble, point)
    return found


def main() -> None:
    """Search, measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of searches and of finished points")
    parser.add_argument("--tables", nargs="+", choices=list(points()), help="only these; all if none is named")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    every = quick_points() if args.quick else points()
    chosen = {name: every[name] for name in args.tables or every}
    tasks = load_tasks(args.data)
    with Workbench(load_config(args.config)) as bench:
        members = tuple(sorted(bench.config.members))
        halves = [Half(bench, tasks, members, split, 4 if args.quick else None) for split in ("even", "odd")]
        made_from = {"positions": [NUM_TUNED_ON, NUM_POSITIONS], "weights": WEIGHTS, "quick": args.quick}
        journal = journal_of(args.cache, "relative_sweep", bench, tasks, made_from)
        seen = samples(bench, halves, args.quick)
        found = measure(Sweep(bench, seen, named_tokens(halves), journal, args.cache), chosen)
    tables = {"baseline": [row(seen[e], None, found[e]) for e in ENSEMBLES]}
    tables |= {
        name: [row(seen[e], point, found[e]) for e in ENSEMBLES for point in every]
        for name, every in chosen.items()
    }
    settings = {
        "quick": args.quick,
        "weights tuned on": f"{NUM_TUNED_ON} even positions",
        "figures of": f"{NUM_POSITIONS} odd positions",
        "K": bench.num_candidates,
    }
    draw(tables, results_folder("studies", args.quick) / "relative_sweep.png")
    Findings("relative_sweep", tables, settings=settings).print()


if __name__ == "__main__":
    main()

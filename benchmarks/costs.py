"""Costs that may grow with the work: each at an eighth, a quarter, a half and the whole of a size, on one thread.

    python -m benchmarks.costs [--config configs/demo.yaml] [--quick]

No model takes part in the figures (see workloads.py for what each kind of work is). Milliseconds are medians of CPU
time; the sizes of one kind take turns. A kind has a bound at its whole size, in milliseconds or over a base that is
measured in the same turns, or on its growth from the smallest size to the whole, or both. The columns `before` are of
benchmarks/results/costs_before.json, the same measurement of an earlier commit. Writes benchmarks/results/costs.png.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import workloads
from benchmarks.ledger import Check, Findings, TableRow, Value, arguments, results_folder
from benchmarks.workloads import Sample

BEFORE = results_folder("benchmarks", quick=False) / "costs_before.json"
PARTS = ("1/8", "1/4", "1/2", "whole")
FLAT, LINEAR = 2.0, 1.25  # how much a cost may grow: in all, and over its size
PATIENCE = 20.0  # seconds for one kind; three rounds at least
TEXT_CHARS = 8000
PROMPT_CHARS = 16_000


@dataclass(frozen=True, slots=True)
class Cost:
    """One kind of work: how it is made at a size, and what it may cost.

    sizes: as many as PARTS, the last ones if fewer. bound: at the last size; None: none. base: what the bound is
    over; None: it is in milliseconds. growth: the most that the whole may cost over the smallest size; None: any.
    """

    what: str
    unit: str
    sizes: tuple[int, ...]
    make: Callable[[int], Sample]
    bound: float | None = None
    base: Callable[[int], Sample] | None = None
    growth: float | None = None

    @property
    def must(self) -> str:
        """The bounds in words."""
        parts = [] if self.bound is None else [f"<= {self.bound:g} " + ("ms" if self.base is None else "x base")]
        if self.growth is not None:
            parts.append(f"<= {self.growth:g} x that of {self.sizes[0]:,}")
        return ", ".join(parts)


def every_cost(config: Path) -> list[Cost]:
    """All kinds of work."""
    wide = (32_768, 65_536, 131_072, 262_144)
    return [
        *(
            Cost(
                f"search for cached prefixes a step, prompts of {length:,} tokens",
                "waiting prompts",
                sizes,
                partial(workloads.prefix_search, length=length),
                bound=1.0,
            )
            for length, sizes in ((4000, (3, 7, 14, 27)), (9, (64, 128, 256, 512)))
        ),
        *_respellings(config),
        Cost(
            "admission of the choices of one prompt of 16,000 characters; base: one choice",
            "choices",
            (16, 32, 64, 128),
            lambda num: workloads.choices(config, num, PROMPT_CHARS),
            bound=1.5,
            base=lambda num: workloads.choices(config, 1, PROMPT_CHARS),
        ),
        Cost(
            "letting waiting sequences in",
            "sequences",
            (64, 128, 256, 512),
            workloads.admit,
            5.0,
            growth=8 * LINEAR,
        ),
        Cost(
            "candidates of 32 rows, one of them JSON; base: all plain",
            "vocabulary",
            wide,
            partial(workloads.candidates, constrained=True),
            bound=1.3,
            base=partial(workloads.candidates, constrained=False),
        ),
        Cost(
            "penalties of 32 sequences a step",
            "tokens",
            (500, 1000, 2000, 4000),
            workloads.penalties,
            1.6,
            growth=FLAT,
        ),
        *(
            Cost(
                f"16 stop strings{which}, a token and sequence",
                "characters each",
                (128, 256, 512, 1024),
                partial(workloads.stop_strings, nearly=nearly),
                0.1,
            )
            for which, nearly in (("", False), (" that nearly match", True))
        ),
        *(
            Cost(
                f"fusion of 32 rows by {name}",
                "members",
                (2, 4, 8),
                partial(workloads.fusion, name),
                growth=4 * LINEAR,
            )
            for name in ("projection", "union")
        ),
    ]


def _respellings(config: Path) -> list[Cost]:
    texts = {
        "Chinese": workloads.chinese,
        "minified JSON": workloads.minified_json,
        "one letter again and again": workloads.one_letter,
    }
    return [
        Cost(
            f"respelling {name} by {member}'s tokenizer, a step",
            "characters",
            (1000, 2000, 4000, TEXT_CHARS),
            partial(workloads.respelling, config, member, write(2 * TEXT_CHARS)),
            bound=0.2,
            growth=FLAT,
        )
        for name, write in texts.items()
        for member in ("gemma3", "smollm2")
    ]


def measure(cost: Cost, sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Medians in milliseconds of each size, and of the base at the last one as "base"."""
    samples = {str(size): cost.make(size) for size in sizes}
    if cost.base is not None:
        samples["base"] = cost.base(sizes[-1])
    found: dict[str, list[float]] = {name: [] for name in samples}
    started = time.monotonic()
    for turn in range(-1, rounds):
        for name, sample in samples.items():
            took = sample()
            if turn >= 0:
                found[name].append(took)
        if turn >= 2 and time.monotonic() - started > PATIENCE:
            break
    return {name: median(values) for name, values in found.items()}


def row(cost: Cost, sizes: Sequence[int], found: Mapping[str, float], before: TableRow | None) -> dict[str, Value]:
    """Of the table."""
    parts = PARTS[len(PARTS) - len(cost.sizes) :]
    by_part = {part: found[str(size)] for part, size in zip(parts, sizes, strict=False)}
    base = found.get("base")
    return {
        "what": cost.what,
        "whole": f"{cost.sizes[-1]:,} {cost.unit}",
        **{f"{part} ms": by_part.get(part) for part in PARTS},
        "base ms": base,
        "before, whole ms": before["whole ms"] if before else None,
        "before, base ms": before["base ms"] if before else None,
        "must": cost.must,
    }


def checks_of(cost: Cost, sizes: Sequence[int], found: Mapping[str, float]) -> list[Check]:
    """The bound at the last size, and that on growth."""
    last = found[str(sizes[-1])]
    where = f"{cost.what}, {sizes[-1]:,} {cost.unit}"
    checks = []
    if cost.bound is not None:
        over = last if cost.base is None else last / found["base"]
        checks.append(Check(f"{where}: {'ms' if cost.base is None else 'over base'}", over, "<=", cost.bound))
    if cost.growth is not None:
        figure = last / found[str(sizes[0])]
        checks.append(Check(f"{where}: over {sizes[0]:,} {cost.unit}", figure, "<=", cost.growth))
    return checks


def earlier() -> dict[str, TableRow]:
    """What -> its row of the earlier commit; empty where there is none."""
    if not BEFORE.exists():
        return {}
    return {each["what"]: each for each in json.loads(BEFORE.read_text())["tables"]["costs"]}


def draw(costs: Sequence[Cost], rows: Sequence[TableRow], before: Mapping[str, TableRow], path: Path) -> None:
    """A panel for each kind: milliseconds over size, both logarithmic; the earlier commit dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = 4
    down = -(-len(costs) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(16, 3.4 * down), layout="constrained")
    for panel, cost, each in zip(panels.flat, costs, rows, strict=False):
        if cost.what in before:
            _line(panel, cost, before[cost.what], label="before", ls="--", color="0.5")
        _line(panel, cost, each, label="now", color="C0")
        panel.set(xscale="log", yscale="log", xlabel=cost.unit, ylabel="ms")
        panel.set_title(cost.what.replace(",", ",\n", 1).replace("; ", ";\n"), fontsize=8)
        panel.set_xticks(cost.sizes, [f"{size:,}" for size in cost.sizes], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=7)
    for panel in panels.flat[len(costs) :]:
        panel.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(panel: Any, cost: Cost, each: TableRow, **style: Any) -> None:
    """What is too short to be told from nothing is drawn as a microsecond."""
    parts = PARTS[len(PARTS) - len(cost.sizes) :]
    points = [(size, each[f"{part} ms"]) for size, part in zip(cost.sizes, parts, strict=True)]
    seen = [(size, max(float(str(ms)), 1e-3)) for size, ms in points if ms is not None]
    panel.plot(*zip(*seen, strict=True), "o-" if "ls" not in style else "o", **style)


def main() -> None:
    """Measure every kind of work, and draw."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    costs, before = every_cost(args.config), earlier()
    rows, checks = [], []
    for cost in tqdm(costs, desc="costs", disable=None):
        sizes = cost.sizes[:2] if args.quick else cost.sizes
        with torch.inference_mode():
            found = measure(cost, sizes, 2 if args.quick else args.rounds)
        rows.append(row(cost, sizes, found, before.get(cost.what)))
        checks += checks_of(cost, sizes, found)
    draw(costs, rows, before, results_folder("benchmarks", args.quick) / "costs.png")
    settings = {"rounds": args.rounds, "quick": args.quick}
    Findings("costs", {"costs": rows}, checks, settings).print()


if __name__ == "__main__":
    main()

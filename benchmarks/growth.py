"""How a step grows: with the number of members (1 to 4), with rows (1 to 32), with context (64 to 1,024 tokens).

    python -m benchmarks.growth [--config configs/demo.yaml] [--quick]

Three and four members are the pair with one or both of its checkpoints a second time, under other names, with
weights, caches and matrices of their own; one member is the main one alone. Milliseconds, medians of decode steps
with quartiles. Writes benchmarks/results/growth.png.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmarks.ledger import Findings, TableRow, Value, arguments, results_folder
from benchmarks.recorder import DecodeBench, Told
from benchmarks.stopwatch import Spread
from ensemble_core.config import Config, EnsembleConfig
from ensemble_core.config_file import load_config
from ensemble_core.transfer.build import recipe_of
from ensemble_core.transfer.store import matrix_path, read_metadata

TWIN = "-twin"
LENGTH = 256
SWEEP_BATCHES = (1, 8)  # of the other two sweeps


def crowd(config: Config, scratch: Path) -> tuple[Config, list[str]]:
    """The first ensemble with 1, 2, 3 and 4 members, and the names of these models. Matrices go to `scratch`."""
    ensemble = next(iter(config.ensembles.values()))
    pair = [ensemble.main, *(name for name in ensemble.members if name != ensemble.main)]
    everyone = [*pair, *(name + TWIN for name in reversed(pair))]
    members = {name: config.members[name.removesuffix(TWIN)] for name in everyone}
    ensembles = {}
    for num in range(2, len(everyone) + 1):
        chosen = everyone[:num]
        weights = {name: ensemble.members[name.removesuffix(TWIN)] for name in chosen}
        ensembles[f"crowd-{num}"] = EnsembleConfig(members=weights, main=pair[0], fusion=ensemble.fusion)
        _copy_matrices(config, pair, chosen, scratch)
    matrices = config.matrices.model_copy(update={"folder": scratch})
    update = {"members": members, "ensembles": ensembles, "matrices": matrices}
    return config.model_copy(update=update), [pair[0], *ensembles]


def _copy_matrices(config: Config, pair: Sequence[str], chosen: Sequence[str], scratch: Path) -> None:
    """Twins share their anchors with their originals, so a matrix fits under the twin's name as well."""
    recipe = recipe_of(config.matrices).name
    for name in chosen:
        source = matrix_path(config.matrices.folder, pair, name.removesuffix(TWIN), recipe)
        goal = matrix_path(scratch, chosen, name, recipe)
        goal.parent.mkdir(parents=True, exist_ok=True)
        save_file(load_file(source), goal, metadata=asdict(read_metadata(source)) | {"member": name})


def step_row(steps: Sequence[Told], **where: Value) -> dict[str, Value]:
    """One row: where it was measured, and what a step took."""
    step = Spread.of([told.stats.seconds for told in steps]).scaled(1e3)
    forwards = Spread.of([told.forward_seconds for told in steps]).scaled(1e3)
    quartiles = f"{step.low:.1f} .. {step.high:.1f}"
    return where | {"step ms": step.median, "quartiles": quartiles, "forwards ms": forwards.median}


def sweep(
    bench: DecodeBench, models: Sequence[str], batches: Sequence[int], lengths: Sequence[int], num: int
) -> dict[str, list[dict[str, Value]]]:
    """The three tables."""
    pair = models[1]
    members = [
        step_row(bench.decode(model, batch, LENGTH, num), B=batch, members=size)
        for batch in SWEEP_BATCHES
        for size, model in enumerate(models, 1)
    ]
    rows = [step_row(bench.decode(pair, batch, LENGTH, num), B=batch, L=LENGTH) for batch in batches]
    context = [
        step_row(bench.decode(pair, batch, length, num), B=batch, L=length)
        for batch in SWEEP_BATCHES
        for length in lengths
    ]
    return {"members": members, "rows": rows, "context": context}


def draw(tables: dict[str, list[dict[str, Value]]], path: Path, caption: str) -> None:
    """One figure with three panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    _by_batch(panels[0], tables["members"], "members")
    panels[0].set(xlabel="members", title=f"Members, context {LENGTH}", xticks=[1, 2, 3, 4])
    _rows_panel(panels[1], tables["rows"])
    _by_batch(panels[2], tables["context"], "L")
    panels[2].set(xlabel="context, tokens", title="Context, two members")
    panels[2].set_xticks([row["L"] for row in tables["context"]])
    panels[2].tick_params(axis="x", labelsize=8)
    for panel in panels:
        panel.set_ylabel("step, ms (median)")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _by_batch(panel: Any, rows: Sequence[TableRow], x: str) -> None:
    """A line of steps for each batch size, and the forwards alone, dashed."""
    for batch in sorted({int(str(row["B"])) for row in rows}):
        mine = [row for row in rows if row["B"] == batch]
        places = [row[x] for row in mine]
        (line,) = panel.plot(places, [row["step ms"] for row in mine], "o-", label=f"step, {_count(batch)}")
        forwards = [row["forwards ms"] for row in mine]
        panel.plot(places, forwards, "--", color=line.get_color(), lw=1, label=f"forwards, {_count(batch)}")


def _rows_panel(panel: Any, rows: Sequence[TableRow]) -> None:
    """Steps over rows, against one row after the other."""
    batches = [float(str(row["B"])) for row in rows]
    steps = [float(str(row["step ms"])) for row in rows]
    panel.plot(batches, steps, "o-", label="step")
    panel.plot(batches, [row["forwards ms"] for row in rows], "--", color="C0", lw=1, label="forwards")
    alone = [steps[0] / batches[0] * batch for batch in batches]
    panel.plot(batches, alone, ":", color="0.4", label="one row after the other")
    panel.set(xlabel="rows (B)", title=f"Rows, two members, context {LENGTH}", xticks=batches)
    top = 2.2 * max(steps)
    panel.set_ylim(0, top)
    panel.tick_params(axis="x", labelsize=8)


def _count(batch: int) -> str:
    return "1 row" if batch == 1 else f"{batch} rows"


def main() -> None:
    """Measure, and draw."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    batches, lengths = ((1, 4), (64, 256)) if args.quick else ((1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024))
    num = 4 if args.quick else args.steps
    with tempfile.TemporaryDirectory() as scratch:
        config, models = crowd(load_config(args.config), Path(scratch))
        tables = sweep(DecodeBench(config), models, batches, lengths, num)
    report = Findings("growth", tables, settings={"steps": num, "quick": args.quick, "models": models})
    facts = report.record()["machine"]
    caption = (
        f"Lockstep step, demo pair (3 and 4: twins), {facts['cpu']}, {facts['threads']} threads, {facts['date']}"
    )
    draw(tables, results_folder("benchmarks", args.quick) / "growth.png", caption)
    report.print()


if __name__ == "__main__":
    main()

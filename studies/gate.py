"""What weights of each place are worth: gates against one weight, for the demo pair and for trained members.

    python -m studies.gate [--config configs/demo.yaml] [--data ../shared/data] [--seed 0] [--keep FOLDER] [--quick]

Each gate is learnt as `unisono tune --method gate` does: on the even half of the documents, whatever fusion it is
for. Figures are bits per byte of the odd half, with the fusion that is named, against the better member and against
two rivals: the weights as configured, and the one best weight of the even half. Intervals are 95 %, paired, over
documents. The demo pair is scored on the five development tasks; two and three members that are trained here (minutes
on two CPU cores; on programs, on English, on both) on held-out text of both kinds. Scores are stored, so a run that
was cut off goes on. --quick is small training alone, without the demo pair. Writes studies/results/gate.png.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ledger import Check, Findings, TableRow, arguments, results_folder
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task, load_task
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.fit_gate import CONFIGURED, GATE, ONE, FittedGate, fit_gate
from studies import domains, small_models
from studies.halves import DATA, load_tasks
from studies.small_models import Family, Size

LEARNT = Selection("even")
MUST = 4.2  # per cent below the better member, demo pair
FUSIONS: dict[str, dict[str, Any]] = {
    "relative": {"name": "relative"},
    "relative, search": {"name": "relative", "options": {"solver": "search"}},
    "projection": {"name": "projection"},
    "union": {"name": "union"},
    "gac": {"name": "gac"},
    "core, projection": {"name": "core", "options": {"base": {"name": "projection"}}},
}


@dataclass(frozen=True, slots=True)
class GatePlan:
    """What is trained, and how much text is measured on. sizes: member -> family and size."""

    sizes: dict[str, tuple[Family, Size]]
    num_modules: int | None
    num_documents: int
    document_bytes: int
    num_candidates: int


FULL = GatePlan(
    {
        "code": ("qwen3", Size(1024, 128, 2, 500, window=128, rate=5e-3)),
        "prose": ("llama", Size(1536, 128, 2, 500, window=128, rate=5e-3)),
        "both": ("llama", Size(768, 128, 2, 500, window=128, rate=5e-3)),
    },
    None,
    480,
    480,
    256,
)
SMALL = GatePlan(
    {
        "code": ("qwen3", Size(480, 64, 1, 120)),
        "prose": ("llama", Size(640, 64, 1, 120)),
        "both": ("llama", Size(400, 64, 1, 120)),
    },
    120,
    60,
    400,
    64,
)


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate of the table."""

    setting: str
    fusion: str
    fitted: FittedGate

    def row(self) -> TableRow:
        """Of the table."""
        fitted = self.fitted
        return {
            "setting": self.setting,
            "main": fitted.members[0],
            "fusion": self.fusion,
            "positions": fitted.num_positions,
            "better member": f"{fitted.ratios[fitted.best_member].value:.4f} ({fitted.best_member})",
            "one weight": f"{fitted.ratios[ONE].value:.4f}",
            "gate": f"{fitted.ratios[GATE].value:.4f}",
            "one weight against the better member, %": shown(fitted, ONE, fitted.best_member),
            "gate against the better member, %": shown(fitted, GATE, fitted.best_member),
            "gate against one weight, %": shown(fitted, GATE, ONE),
            "gate against the configured weights, %": shown(fitted, GATE, CONFIGURED),
        }


def shown(fitted: FittedGate, name: str, other: str) -> str:
    """A change with its interval, in per cent."""
    change = fitted.over(name, other)
    return f"{100 * change.value:+.2f} ({100 * change.low:+.2f} .. {100 * change.high:+.2f})"


def with_fusions(
    config: Config, members: dict[str, float], mains: Sequence[str], fusions: Sequence[str]
) -> Config:
    """The configuration with an ensemble for each main and fusion."""
    recipes = {
        f"{main}: {fusion}": {"members": members, "main": main, "fusion": FUSIONS[fusion]}
        for main in mains
        for fusion in fusions
    }
    named = {f"gated-{number}": recipe for number, recipe in enumerate(recipes.values())}
    return config.replaced(ensembles=named)


def measured(
    setting: str, config: Config, tasks: Sequence[Task], cache: Path | None, seed: int
) -> list[GateResult]:
    """A gate for each of the configuration's ensembles."""
    found = []
    with Workbench(config, cache) as bench:
        for name, recipe in bench.config.ensembles.items():
            fusion = next(each for each, way in FUSIONS.items() if way == _plain(recipe.fusion.model_dump()))
            found.append(GateResult(setting, fusion, fit_gate(bench, name, tasks, LEARNT, seed)))
    return found


def _plain(fusion: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fusion.items() if value != {}}


def demo(path: Path, data: Path, seed: int) -> list[GateResult]:
    """The demo pair, each member main once, with the weights of its ensembles."""
    config = load_config(path)
    tasks, found = load_tasks(data), list[GateResult]()
    for ensemble in ("duet", "duet-smollm2"):
        recipe = config.ensembles[ensemble]
        own = with_fusions(config, dict(recipe.members), [recipe.main], list(FUSIONS))
        found += measured("demo pair", own, tasks, None, seed)
    return found


def trained(plan: GatePlan, folder: Path, seed: int) -> list[GateResult]:
    """Two members, then three, of those that are trained here."""
    corpora = domains.read_domains(seed, plan.num_modules)
    texts = {name: list(corpus.training) for name, corpus in corpora.items()}
    texts["both"] = [*texts["code"][::2], *texts["prose"][::2]]
    for name, (family, size) in plan.sizes.items():
        if (folder / name / "model.safetensors").exists():
            continue
        small_models.train(family, texts[name], folder / name, size, seed)
    kinds = [corpora["code"], corpora["prose"]]
    mixed = domains.mixed_documents(kinds, plan.num_documents, plan.document_bytes, seed)
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    tasks, found = [load_task("mixed", folder / "mixed.jsonl")], list[GateResult]()
    for names in (("code", "prose"), tuple(plan.sizes)):
        path = folder / f"{len(names)}-members.yaml"
        path.write_text(yaml.safe_dump(_configuration(plan, names), sort_keys=False))
        config = load_config(path)
        equal = dict.fromkeys(names, 1.0)
        own = with_fusions(config, equal, names[:2], ["projection", "union", "core, projection"])
        found += measured(f"{len(names)} trained members", own, tasks, folder / "scores", seed)
    return found


def _configuration(plan: GatePlan, names: Sequence[str]) -> dict[str, Any]:
    member = {"dtype": "float32", "device": "cpu", "kv_memory": "64MiB", "max_len": small_models.MAX_LEN}
    return {
        "members": {name: {"model": f"./{name}"} | member for name in names},
        "scheduler": {"num_candidates": plan.num_candidates},
    }


def checks(found: Sequence[GateResult], quick: bool) -> list[Check]:
    """What the product claims of gates."""
    bounds = []
    for each in found:
        what = f"{each.setting}, main {each.fitted.members[0]}, {each.fusion}"
        if each.setting == "demo pair" and each.fusion == "relative":
            below = -100 * each.fitted.over(GATE, each.fitted.best_member).value
            bounds.append(Check(f"{what}: gate below the better member, %", below, ">=", MUST))
        if not quick and each.fusion in ("relative", "projection"):
            high = 100 * each.fitted.over(GATE, ONE).high
            bounds.append(Check(f"{what}: upper edge of gate against one weight, %", high, "<=", 0.0))
    return bounds


def draw(found: Sequence[GateResult], path: Path) -> None:
    """Changes against the better member with their intervals: one weight, and the gate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.3 * len(found) + 1.4), layout="constrained")
    panel = figure.subplots()
    for number, (name, colour) in enumerate(((ONE, "0.5"), (GATE, "C0"))):
        for place, each in enumerate(found):
            change = each.fitted.over(name, each.fitted.best_member)
            reach = [[100 * (change.value - change.low)], [100 * (change.high - change.value)]]
            label = name if place == 0 else None
            at = place + 0.2 * number
            panel.errorbar(100 * change.value, at, xerr=reach, fmt="o", color=colour, ms=4, capsize=2, label=label)
    panel.axvline(0, color="0.4", lw=1)
    names = [f"{each.setting}: {each.fusion} ({each.fitted.members[0]})" for each in found]
    panel.set_yticks(range(len(found)), names, fontsize=8)
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    panel.set_xlabel("bits per byte against the better member, %, with 95 % intervals")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, learn, measure."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    parser.add_argument("--seed", type=int, default=0, help="of training and of what is held out")
    parser.add_argument("--keep", type=Path, help="a folder for what is trained, its texts and scores")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = [] if args.quick else demo(args.config, args.data, args.seed)
        found += trained(SMALL if args.quick else FULL, folder, args.seed)
    draw(found, results_folder("studies", args.quick) / "gate.png")
    settings = {"seed": args.seed, "quick": args.quick}
    Findings("gate", {"gates": [each.row() for each in found]}, checks(found, args.quick), settings).print()


if __name__ == "__main__":
    main()

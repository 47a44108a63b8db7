"""A pair that should help: two small models trained here, on programs and on English, fused over text that has both.

    python -m studies.trained_pair [--seed 0] [--keep FOLDER] [--quick]

Trains both (minutes on two CPU cores) with tokenizers of their own, builds their matrices, and then does what
`unisono tune` and `unisono evaluate` do: weights on one half of the mixed documents, bits per byte on the other,
against the better member on that very half, with paired bootstrap intervals over documents. Nothing of a mixed
document was seen in training. Bits count all of main's tokens from the first place that both tokenizers share: fused
at shared positions, main's own elsewhere. *echo* is the same by the engine's own teacher-forced scores (echo with
log-probabilities), over all but main's first token. --keep leaves checkpoints, matrices, documents and a
configuration that `unisono serve` takes; --plot draws the table. --quick is the small version that the tests run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ledger import Check, Findings, TableRow, Value, arguments
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import Task, load_task
from ensemble_core.evaluation.tune import tune
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.evaluation.yaml_weights import write_weights
from ensemble_core.transfer.build import build_matrices
from studies import domains, small_models
from studies.small_models import Family, Size

GAIN = 0.05  # of the better member's bits per byte
TUNED, REPORTED = Selection("even"), Selection("odd")
_FUSIONS: Mapping[str, Mapping[str, Any]] = {
    "relative": {"name": "relative"},
    "relative-search": {"name": "relative", "options": {"solver": "search"}},
    "linear": {"name": "projection"},
    "log-linear": {"name": "projection", "options": {"pool": "log-linear"}},
    "union": {"name": "union"},
    "core-linear": {"name": "core", "options": {"base": {"name": "projection"}}},
}


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What is trained and measured. fusions: of _FUSIONS, with the code member as main; others: with prose's."""

    sizes: Mapping[str, tuple[Family, Size]]  # domain -> its member
    num_modules: int | None
    num_documents: int
    num_positions: int  # shared ones of the other half, that weights are tuned on
    document_bytes: int
    num_candidates: int
    fusions: tuple[str, ...]
    others: tuple[str, ...] = ()


FULL = TrainingPlan(
    sizes={
        "code": ("qwen3", Size(1024, 128, 2, 500, window=128, rate=5e-3)),
        "prose": ("llama", Size(1536, 128, 2, 500, window=128, rate=5e-3)),
    },
    num_modules=None,
    num_documents=160,
    num_positions=3000,
    document_bytes=480,
    num_candidates=256,
    fusions=tuple(_FUSIONS),
    others=("relative", "linear"),
)
SMALL = TrainingPlan(
    sizes={"code": ("qwen3", Size(480, 64, 1, 330)), "prose": ("llama", Size(640, 64, 1, 330))},
    num_modules=120,
    num_documents=80,
    num_positions=1000,
    document_bytes=400,
    num_candidates=128,
    fusions=("relative", "linear"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One model on the documents that are reported."""

    model: str
    weights: Mapping[str, float]
    bits: Ratio  # over bytes
    shared: Ratio  # nats over shared positions
    echo: float  # bits per byte

    def over(self, other: Measured) -> Interval:
        """Its bits over another's on the same documents, with the paired interval."""
        return interval(Ratio(self.bits.numerators, other.bits.numerators), draws(len(self.bits.numerators)))

    def row(self, best: Measured) -> TableRow:
        """Of the table."""
        against, shown = self.over(best), interval(self.bits, draws(len(self.bits.numerators)))
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in self.weights.items())
        change = f"{against.value - 1:+.1%} ({against.low - 1:+.1%} .. {against.high - 1:+.1%})"
        return {
            "model": self.model,
            "weights": weights,
            "bits/byte": shown.value,
            "95 % interval": f"{shown.low:.3f} .. {shown.high:.3f}",
            "against the best member": "" if self is best else change,
            "nats/shared position": self.shared.value,
            "echo bits/byte": self.echo,
        }


def prepare(plan: TrainingPlan, folder: Path, seed: int) -> Path:
    """Train the members, write the mixed documents, the configuration and the matrices; returns the configuration."""
    corpora = domains.read_domains(seed, plan.num_modules)
    for domain, (family, size) in plan.sizes.items():
        small_models.train(family, corpora[domain].training, folder / domain, size, seed)
    kinds = [corpora[domain] for domain in plan.sizes]
    mixed = domains.mixed_documents(kinds, plan.num_documents, plan.document_bytes, seed)
    (folder / "mixed.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed))
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(_configuration(plan), sort_keys=False))
    build_matrices(load_config(path), force=False, only_missing=False)
    return path


def measure(path: Path, num_positions: int) -> list[Measured]:
    """Tune every ensemble on one half of the documents, write the weights down, and measure all on the other."""
    task = load_task("mixed", path.parent / "mixed.jsonl")
    with Workbench(load_config(path), path.parent / "scores") as bench:
        for name in bench.config.ensembles:
            tuned = tune(bench, Variant(name, name, Overrides()), [task], "nll", TUNED, num_positions)
            write_weights(path, name, dict(zip(tuned.members, tuned.after, strict=True)))
    config = load_config(path)
    with Workbench(config, path.parent / "scores") as bench:
        return [_measured(bench, name, task) for name in (*config.members, *config.ensembles)]


def best_member(found: Sequence[Measured]) -> Measured:
    """The better one on what is reported: the harder one to beat."""
    return min((each for each in found if not each.weights), key=lambda each: each.bits.value)


def _configuration(plan: TrainingPlan) -> dict[str, Any]:
    """Weights begin equal."""
    code, prose = plan.sizes
    member = {"dtype": "float32", "device": "cpu", "kv_memory": "64MiB", "max_len": small_models.MAX_LEN}
    chosen = [(code, name) for name in plan.fusions] + [(prose, name) for name in plan.others]
    ensembles = {
        f"{fusion}-{main}": {"members": {code: 0.5, prose: 0.5}, "main": main, "fusion": dict(_FUSIONS[fusion])}
        for main, fusion in chosen
    }
    return {
        "members": {domain: {"model": f"./{domain}"} | member for domain in plan.sizes},
        "ensembles": ensembles,
        "matrices": {"folder": "matrices"},
        "scheduler": {"num_candidates": plan.num_candidates},
    }


def _measured(bench: Workbench, model: str, task: Task) -> Measured:
    items = REPORTED.items(task)
    recipe = bench.recipe(Variant(model, model, Overrides()))
    scores = bench.scores(measures.documents(task, items), bench.config.members, model)
    sums = bench.sums(scores, recipe)
    kept = sums.num_bytes > 0
    weights = dict(zip(recipe.members, recipe.weights, strict=True)) if recipe.fusion else {}
    return Measured(
        model,
        weights,
        Ratio(sums.bits[kept], sums.num_bytes[kept]),
        Ratio(sums.shared_nats[kept], sums.positions[kept]),
        _echoed(bench, model, [item.text for item in items]),
    )


def _echoed(bench: Workbench, model: str, texts: Sequence[str]) -> float:
    """Bits per byte by the engine's scores of the texts as prompts."""
    params = SamplingParams(max_tokens=0, echo=True, logprobs=0)
    done = bench.llm().generate(texts, params, model)
    scored = [entry for completion in done for entry in completion.prompt_logprobs[1:]]
    nats = -sum(entry.logprob for entry in scored if entry.logprob is not None)
    starts = [completion.prompt_logprobs[1].text_offset for completion in done]
    num_bytes = sum(len(text[start:].encode()) for text, start in zip(texts, starts, strict=True))
    return nats / math.log(2) / num_bytes


def report(found: Sequence[Measured], settings: Mapping[str, Value]) -> Findings:
    """The table, and what the first ensemble must do: its whole interval better than the best member by GAIN."""
    best = best_member(found)
    first = next(each for each in found if each.weights)
    what = f"{first.model}: bits per byte / {best.model}'s, the better member; upper end of the interval"
    check = Check(what, first.over(best).high, "<=", 1 - GAIN)
    return Findings("trained_pair", {"models": [each.row(best) for each in found]}, [check], settings)


def draw(found: Sequence[Measured], path: Path) -> None:
    """Bits per byte with their intervals, as a PNG."""
    from matplotlib.figure import Figure

    shown = [interval(each.bits, draws(len(each.bits.numerators))) for each in found]
    spread = [[value.value - value.low for value in shown], [value.high - value.value for value in shown]]
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(found)), layout="constrained")
    panel = figure.subplots()
    panel.barh([each.model for each in found], [value.value for value in shown], xerr=spread)
    panel.invert_yaxis()
    panel.set_xlabel("bits per byte of mixed text")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, tune, measure."""
    parser = arguments(__doc__, config=False)
    parser.add_argument("--seed", type=int, default=0, help="of everything: texts, training, what is held out")
    parser.add_argument("--keep", type=Path, help="a folder for all that is made")
    parser.add_argument("--plot", type=Path, help="a PNG file for the table as bars")
    args = parser.parse_args()
    plan = SMALL if args.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(prepare(plan, folder, args.seed), plan.num_positions)
    if args.plot is not None:
        draw(found, args.plot)
    settings = {
        "seed": args.seed,
        "documents": plan.num_documents // 2,
        "positions tuned on": plan.num_positions,
        "quick": args.quick,
    }
    report(found, settings).print()


if __name__ == "__main__":
    main()

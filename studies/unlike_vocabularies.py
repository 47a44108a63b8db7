"""Members whose vocabularies share little: what fusion in relative space can do there that the direct map cannot.

    python -m studies.unlike_vocabularies [--pairs NAME ...] [--seed 0] [--keep FOLDER] [--quick]

Trains small models (minutes each on a CPU): programs in words (BPE), and English in single bytes, in few pieces, in
words of another kind (unigram), and in Greek letters. Each pair is fused over documents that mix both members'
texts, of modules and topics that no member has seen. Every fusion has the weight that is best for it on even
documents; rows in relative space also their temperature. All figures are of odd documents, in bits per byte of main's
tokens (fused at shared positions, main's own elsewhere), with 95 % intervals over documents, differences paired. The
rival is the best direct map as the odd documents themselves show it. Two maps are learnt from text by EM
(`linear_map`): on even documents, and on the odd ones, which no direct map with a linear pool can beat. Distributions
are whole but where a table says K. --keep leaves all that is made; a run that was cut off goes on there. Writes
studies/results/unlike_vocabularies.png.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from benchmarks.ledger import Check, Findings, TableRow, arguments, results_folder
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import Overrides
from ensemble_core.evaluation import measures
from ensemble_core.evaluation.bootstrap import Interval
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.tasks import Split, Task, load_task
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from studies import domains, small_models
from studies.domains import Corpus
from studies.halves import journal_of
from studies.small_models import Family, Size
from studies.unlike_pairs import DIRECT, LEARNT, RELATIVE, Outcome, UnlikePair

GAIN = 0.01  # of the best direct map's bits per byte
FIRST = "letters"  # the pair that must show it
SERVED = ("projection, linear", "projection, log-linear", "core, projection", "spelling, EM 1", "core, spelling")
SERVED_K = 256
_CONTEXT_BYTES = 60_000  # of each kind of training text, for rows from contexts
_LATIN, _GREEK = "abcdefghijklmnopqrstuvwxyz", "αβψδεφγηιξκλμνοπϟρστθωςχυζ"


@dataclass(frozen=True, slots=True)
class Learner:
    """A member to be trained. text: of TEXTS."""

    text: str
    family: Family
    size: Size


@dataclass(frozen=True, slots=True)
class Pair:
    """Main and assistant, by name; documents have pieces of both their texts."""

    main: str
    assistant: str

    @property
    def members(self) -> tuple[str, str]:
        """Main first."""
        return self.main, self.assistant

    @property
    def model(self) -> str:
        """Name of the ensemble."""
        return "-".join(self.members)


@dataclass(frozen=True, slots=True)
class UnlikePlan:
    """What is trained and measured."""

    learners: Mapping[str, Learner]
    pairs: Mapping[str, Pair]
    num_modules: int | None
    num_documents: int
    document_bytes: int
    num_tuned_on: int  # shared positions of the even half
    num_candidates: int  # K: all of every vocabulary


_PAIRS = {
    "letters": Pair("words", "letters"),
    "letters are main": Pair("letters", "words"),
    "pieces": Pair("words", "pieces"),
    "unigram": Pair("words", "unigram"),
    "two scripts": Pair("latin", "greek"),
}
FULL = UnlikePlan(
    learners={
        "words": Learner("code", "qwen3", Size(1024, 64, 1, 400)),
        "letters": Learner("prose", "llama", Size(257, 128, 2, 400, window=256, rate=5e-3)),
        "pieces": Learner("prose", "llama", Size(384, 64, 2, 400, window=96)),
        "unigram": Learner("prose", "llama", Size(1024, 64, 1, 400, tokenizer="unigram")),
        "latin": Learner("prose", "qwen3", Size(1024, 64, 1, 400)),
        "greek": Learner("greek", "llama", Size(1024, 64, 1, 400)),
    },
    pairs=_PAIRS,
    num_modules=None,
    num_documents=120,
    document_bytes=400,
    num_tuned_on=600,
    num_candidates=1024,
)
SMALL = UnlikePlan(
    learners={
        "words": Learner("code", "qwen3", Size(480, 64, 1, 200)),
        "letters": Learner("prose", "llama", Size(257, 64, 1, 200, window=128)),
    },
    pairs={"letters": _PAIRS["letters"]},
    num_modules=120,
    num_documents=40,
    document_bytes=400,
    num_tuned_on=400,
    num_candidates=512,
)


def greek(text: str) -> str:
    """Other letters, one for one."""
    return text.translate(str.maketrans(_LATIN + _LATIN.upper(), _GREEK + _GREEK.upper()))


def read_texts(seed: int, num_modules: int | None) -> dict[str, Corpus]:
    """What members learn, and documents are made of."""
    texts = domains.read_domains(seed, num_modules)
    prose = texts["prose"]
    held_out = tuple(map(greek, prose.held_out))
    return {**texts, "greek": Corpus(tuple(map(greek, prose.training)), held_out)}


def prepare(plan: UnlikePlan, folder: Path, seed: int, pairs: Sequence[str]) -> None:
    """Train what is missing, write documents and a configuration for each pair."""
    texts, chosen = read_texts(seed, plan.num_modules), [plan.pairs[name] for name in pairs]
    for name in sorted({name for pair in chosen for name in pair.members}):
        learner = plan.learners[name]
        if not (folder / name / "tokenizer.json").exists():
            small_models.train(learner.family, texts[learner.text].training, folder / name, learner.size, seed)
    for kinds in sorted({_kinds(plan, pair) for pair in chosen}):
        mixed = domains.mixed_documents(
            [texts[kind] for kind in kinds], plan.num_documents, plan.document_bytes, seed
        )
        (folder / f"{'+'.join(kinds)}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in mixed)
        )
    for pair in chosen:
        text = yaml.safe_dump(_configuration(pair, plan.num_candidates), sort_keys=False)
        (folder / f"{pair.model}.yaml").write_text(text)


def _kinds(plan: UnlikePlan, pair: Pair) -> tuple[str, ...]:
    return tuple(sorted(plan.learners[name].text for name in pair.members))


def _configuration(pair: Pair, num_candidates: int) -> dict[str, Any]:
    member = {"dtype": "float32", "device": "cpu", "kv_memory": "64MiB", "max_len": small_models.MAX_LEN}
    weights = dict.fromkeys(pair.members, 0.5)
    return {
        "members": {name: {"model": f"./{name}"} | member for name in pair.members},
        "ensembles": {pair.model: {"members": weights, "main": pair.main, "fusion": {"name": "projection"}}},
        "scheduler": {"num_candidates": num_candidates},
    }


@dataclass(frozen=True, slots=True)
class Compared:
    """A pair's outcomes: its members alone (main first), fusions and learnt maps."""

    name: str
    outcomes: Sequence[Outcome]
    served: Sequence[Outcome]
    common: float  # share of shared positions whose true token both vocabularies have
    rows: Sequence[TableRow]

    @classmethod
    def of(cls, name: str, pair: UnlikePair) -> Compared:
        """Measured on the odd documents."""
        every = name == FIRST
        alone = [pair.alone(member) for member in pair.plain.members]
        outcomes = [*alone, *pair.fused(every), pair.log_linear(), *pair.learnt()]
        rival, common = best_direct(outcomes), pair.is_common
        rows = [_row(name, each, alone[0], rival, common) for each in outcomes]
        served = pair.served(SERVED, SERVED_K) if every else []
        return cls(name, outcomes, served, float(common.double().mean()), rows)

    def relative_over_direct(self) -> Interval:
        """Bits of the served recipe over the best direct map's."""
        own = next(each for each in self.outcomes if each.label == "spelling, EM 1")
        return own.over(best_direct(self.outcomes))


def best_direct(outcomes: Sequence[Outcome]) -> Outcome:
    """The hardest one to beat on these very documents."""
    return min((each for each in outcomes if each.kind == DIRECT), key=lambda each: each.bits_per_byte.value)


def _row(name: str, own: Outcome, main: Outcome, rival: Outcome, common: Tensor) -> TableRow:
    """Of the table."""
    nats = own.nats
    return {
        "pair": name,
        "fusion": own.label,
        "kind": own.kind,
        "weight of main": "" if own.weight is None else f"{own.weight:.2f}",
        "bits per byte": f"{own.bits_per_byte.value:.4f}",
        "against main alone": changed(own.over(main)),
        "against the best direct map": "" if own is rival else changed(own.over(rival)),
        "nats, token in both": _mean(nats[common] if len(nats) else nats),
        "nats, in main alone": _mean(nats[~common] if len(nats) else nats),
    }


def _mean(nats: Tensor) -> str:
    return f"{float(nats.mean()):.3f}" if len(nats) else ""


def changed(found: Interval) -> str:
    """A ratio as a change in per cent."""
    value, low, high = (100 * (each - 1) for each in (found.value, found.low, found.high))
    return f"{value:+.2f} % ({low:+.2f} .. {high:+.2f})"


def compare(plan: UnlikePlan, folder: Path, pairs: Sequence[str], seed: int) -> list[Compared]:
    """Every pair in turn."""
    texts = read_texts(seed, plan.num_modules)
    return [_compared(plan, folder, name, texts, seed) for name in pairs]


def _compared(plan: UnlikePlan, folder: Path, name: str, texts: Mapping[str, Corpus], seed: int) -> Compared:
    pair = plan.pairs[name]
    kinds = _kinds(plan, pair)
    task = load_task("mixed", folder / f"{'+'.join(kinds)}.jsonl")
    made_from = {"pair": name, "tuned on": plan.num_tuned_on, "seed": seed}
    with Workbench(load_config(folder / f"{pair.model}.yaml"), folder / "scores") as bench:
        measured = UnlikePair(
            bench,
            bench.recipe(Variant(pair.model, pair.model, Overrides())),
            (_half(bench, task, pair, "even"), _half(bench, task, pair, "odd")),
            plan.num_tuned_on,
            folder,
            ["\n\n".join(texts[kind].training)[:_CONTEXT_BYTES] for kind in kinds],
            journal_of(folder, "unlike_vocabularies", bench, [task], made_from),
        )
        return Compared.of(name, measured)


def _half(bench: Workbench, task: Task, pair: Pair, split: Split) -> Scores:
    documents = measures.documents(task, Selection(split).items(task))
    return bench.scores(documents, pair.members, f"{pair.model}, {split}")


def tables(found: Sequence[Compared]) -> dict[str, list[TableRow]]:
    """Every fusion of every pair, what the vocabularies share, and candidates alone."""
    shared: list[TableRow] = [
        {
            "pair": each.name,
            "true tokens that both have": f"{each.common:.1%}",
            "best direct map": best_direct(each.outcomes).label,
            "spelling, EM 1, against it": changed(each.relative_over_direct()),
        }
        for each in found
    ]
    served: list[TableRow] = [
        {
            "pair": each.name,
            "fusion": own.label,
            f"bits per byte, K = {SERVED_K}": f"{own.bits_per_byte.value:.4f}",
            "against the best direct map of these": changed(own.over(best_direct(each.served))),
        }
        for each in found
        for own in each.served
    ]
    return {"pairs": shared, "fusions": [row for each in found for row in each.rows], "served": served}


def checks(found: Sequence[Compared]) -> list[Check]:
    """What the product claims."""
    for each in found:
        if each.name == FIRST:
            ratio, what = each.relative_over_direct(), f"{FIRST}: bits of relative (spelling) / best direct map's"
            return [Check(what, ratio.value, "<=", 1 - GAIN), Check(f"{what}, upper end", ratio.high, "<=", 1.0)]
    return []


def draw(found: Sequence[Compared], path: Path) -> None:
    """Change against main alone with its interval, a panel a pair; lower is better."""
    from matplotlib.figure import Figure

    colours = {DIRECT: "C0", RELATIVE: "C1", LEARNT: "0.5"}
    heights = [len(each.outcomes) - 1 for each in found]
    figure = Figure(figsize=(8, 1 + 0.26 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, each in zip(panels, found, strict=True):
        shown = [own for own in each.outcomes if own.kind in colours]
        for place, own in enumerate(shown):
            ratio = own.over(each.outcomes[0])
            value, reach = 100 * (ratio.value - 1), [[ratio.value - ratio.low], [ratio.high - ratio.value]]
            panel.errorbar(value, place, xerr=[[100 * end[0]] for end in reach], fmt="o", color=colours[own.kind])
        panel.set_yticks(range(len(shown)), [own.label for own in shown], fontsize=7)
        panel.invert_yaxis()
        panel.axvline(0, color="0.4", lw=1)
        panel.grid(alpha=0.3, axis="x")
        panel.set_title(each.name, fontsize=9)
    panels[-1].set_xlabel(
        "bits per byte against main alone, % (blue: direct, orange: relative, grey: learnt maps)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, tune, measure."""
    parser = arguments(__doc__, config=False)
    parser.add_argument("--pairs", nargs="+", choices=list(FULL.pairs), help="only these; all if none is named")
    parser.add_argument("--seed", type=int, default=0, help="of texts and training")
    parser.add_argument("--keep", type=Path, help="a folder for all that is made, found again by the next run")
    args = parser.parse_args()
    plan = SMALL if args.quick else FULL
    pairs = [name for name in args.pairs or plan.pairs if name in plan.pairs]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(plan, folder, args.seed, pairs)
        found = compare(plan, folder, pairs, args.seed)
    draw(found, results_folder("studies", args.quick) / "unlike_vocabularies.png")
    settings = {
        "seed": args.seed,
        "documents": plan.num_documents // 2,
        "positions tuned on": plan.num_tuned_on,
        "K": plan.num_candidates,
        "quick": args.quick,
    }
    Findings("unlike_vocabularies", tables(found), checks(found), settings).print()


if __name__ == "__main__":
    main()

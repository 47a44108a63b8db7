"""A router over two models that are good at different texts: how near it comes to the best choice, and what it costs.

    python -m studies.routing [--seed 0] [--quick]

Trains the pair of `trained_pair` (minutes on two CPU cores), fits the router of a council on the even half of
documents that are programs or English, and reports on the odd half: how often it picks the model that is better,
how much of the way from the better single model to the best choice it goes in bits, and how long a question
takes. The router sees the first half of a document; the bits are of all of it. Nothing of a document was seen in
training.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.ledger import Check, Findings, TableRow, Value, arguments
from ensemble_core.config_file import load_config
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.tasks import load_task
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.fit_router import Fitted, fit_router, router_of, without
from studies import domains, trained_pair
from studies.trained_pair import FULL, SMALL, TrainingPlan

AGREEMENT = GAP = 0.95
MILLISECONDS = 2.0
_WAYS = ("linear", "clusters")
_REPEATS = 5
_MOST = 200  # documents of one kind


@dataclass(frozen=True, slots=True)
class Routed:
    """One way of choosing. gap: share of the way from the best model to the best choice. ms: of one question."""

    by: str
    fitted: Fitted
    ms: float
    num_documents: int  # that it was judged on

    @property
    def gap(self) -> float:
        """Bits that the router saves over those that the best choice saves."""
        values = {each.name: each.value.value for each in self.fitted.compared}
        best = next(value for name, value in values.items() if "best model" in name)
        return (values["routed"] - best) / (values["best choice"] - best)

    def rows(self) -> list[TableRow]:
        """Of the table."""
        return [
            {
                "by": self.by,
                "chosen by": each.name,
                "bits/byte": -each.value.value,
                "difference": "" if each.difference is None else f"{-each.difference.value:+.4f}",
                "95 % interval": ""
                if each.difference is None
                else f"{-each.difference.high:+.4f} .. {-each.difference.low:+.4f}",
            }
            for each in self.fitted.compared
        ]


def write_documents(folder: Path, plan: TrainingPlan, seed: int) -> Path:
    """Documents of one kind each, in a random order of the seed's, so that neither half has one kind alone."""
    corpora = domains.read_domains(seed, plan.num_modules)
    kinds = [domains.documents(corpora[name], plan.document_bytes // 2, seed)[:_MOST] for name in plan.sizes]
    texts = [text for pair in zip(*kinds, strict=False) for text in pair]  # as many of each
    texts = [texts[rank] for rank in domains.shuffled(len(texts), seed)]
    path = folder / "single.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def route(folder: Path, documents: Path) -> list[Routed]:
    """Fit a router of each kind on the pair in `folder`, and judge it."""
    task = load_task("single", documents)
    found = []
    for by in _WAYS:
        config = load_config(with_council(folder, by))
        with Workbench(without(config, "smart"), folder / "scores") as bench:
            fitted = fit_router(bench, router_of(config, "smart"), [task], Selection("even"), None)
        texts = [item.text[: len(item.text) // 2] for item in Selection("odd").items(task)]
        found.append(Routed(by, fitted, _milliseconds(fitted, texts), len(texts)))
    return found


def with_council(folder: Path, by: str) -> Path:
    """The pair's configuration with a council over its members, which no artefact has yet."""
    raw = yaml.safe_load((folder / "pair.yaml").read_text())
    models = list(raw["members"])
    raw["ensembles"]["smart"] = {"kind": "route", "models": models, "by": by, "artefact": f"./router-{by}"}
    path = folder / f"route-{by}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def _milliseconds(fitted: Fitted, questions: Sequence[str]) -> float:
    """Median of a question, features included."""
    times = []
    for question in list(questions) * _REPEATS:
        start = time.perf_counter()
        fitted.router.scores(question, None)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def report(found: Sequence[Routed], settings: Mapping[str, Value]) -> Findings:
    """Tables, and what the linear router must do."""
    linear = found[0]
    checks = [
        Check("linear: documents for which it picks the better model", linear.fitted.agreement, ">=", AGREEMENT),
        Check("linear: share of the way to the best choice, in bits", linear.gap, ">=", GAP),
        Check("linear: milliseconds a question", linear.ms, "<=", MILLISECONDS),
    ]
    summary: list[TableRow] = [
        {
            "by": each.by,
            "better model picked": each.fitted.agreement,
            "of the way to the best choice": each.gap,
            "ms a question": each.ms,
        }
        for each in found
    ]
    return Findings(
        "routing", {"routers": summary, "bits": [row for each in found for row in each.rows()]}, checks, settings
    )


def main() -> None:
    """Train, fit, judge."""
    parser = arguments(__doc__, config=False)
    parser.add_argument("--seed", type=int, default=0, help="of everything: texts, training, what is held out")
    args = parser.parse_args()
    plan = SMALL if args.quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trained_pair.prepare(plan, folder, args.seed)
        found = route(folder, write_documents(folder, plan, args.seed))
    report(found, {"seed": args.seed, "documents": found[0].num_documents, "quick": args.quick}).print()


if __name__ == "__main__":
    main()

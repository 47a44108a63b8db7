"""What votes are worth beside fusing every token: one answer, five, fifteen, of one model, of both, of the ensemble.

    python -m studies.votes [--arc 100] [--gsm8k 40] [--quick]

Answers development questions of ARC (a letter) and GSM8K (a number) by generation, after a few answered examples of
the other half. One answer is greedy; samples of a vote are drawn at temperature 0.7. Accuracy has a 95 % bootstrap
interval over questions; tokens are all that the models wrote, seconds are of all questions in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from benchmarks.ledger import DEMO, ROOT, Findings, TableRow, arguments
from ensemble_core.config import Config
from ensemble_core.councils.answers import PlainForm, answer_in
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation.bootstrap import Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.tasks import Item, Task, load_task
from ensemble_core.llm import LLM

DATA = ROOT.parent / "shared" / "data"
_LIMITS = {"max_calls": 64, "max_tokens": 100_000, "seconds": 36_000}
_VOTES: Mapping[str, Mapping[str, int]] = {
    "5 x gemma3": {"gemma3": 5},
    "15 x gemma3": {"gemma3": 15},
    "5 x smollm2": {"smollm2": 5},
    "8 x gemma3, 7 x smollm2": {"gemma3": 8, "smollm2": 7},
    "5 x duet": {"duet": 5},
}
_SINGLE = ("gemma3", "smollm2", "duet")


@dataclass(frozen=True, slots=True)
class Setting:
    """How a task is answered. shots: answered examples before a question."""

    task: str
    file: str
    form: PlainForm
    shots: int
    params: SamplingParams


SETTINGS = (
    Setting(
        "arc", "arc_challenge_dev.jsonl", "choice", 3, SamplingParams(max_tokens=8, temperature=0.0, stop=("\n",))
    ),
    Setting(
        "gsm8k",
        "gsm8k_dev.jsonl",
        "number",
        2,
        SamplingParams(max_tokens=128, temperature=0.0, stop=("\n\n", "Question:")),
    ),
)


@dataclass(frozen=True, slots=True)
class Answered:
    """One model on one task. right: (N,) 1 or 0."""

    model: str
    right: torch.Tensor
    num_tokens: int
    seconds: float


def configuration(forms: Sequence[PlainForm]) -> Config:
    """The demo's members and `duet`, with a council for every vote and form of answer."""
    raw = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    votes = {
        _name(label, form): {
            "kind": "vote",
            "models": dict(models),
            "answer": form,
            "temperature": 0.7,
            "limits": _LIMITS,
        }
        for label, models in _VOTES.items()
        for form in forms
    }
    sections = {
        "members": raw["members"],
        "ensembles": {"duet": raw["ensembles"]["duet"]} | votes,
        "matrices": raw["matrices"] | {"folder": str(ROOT / "matrices")},
    }
    return Config.model_validate(sections)


def _name(label: str, form: PlainForm) -> str:
    return f"{label.replace(' ', '').replace(',', '-')}-{form}"


def asked(item: Item, form: PlainForm) -> str:
    """A question as models read it."""
    if form == "number":
        return f"Question: {item.question}\nAnswer:"
    options = "\n".join(f"{'ABCDEFGH'[rank]}. {text}" for rank, text in enumerate(item.options))
    return f"Question: {item.question}\n{options}\nAnswer:"


def gold(item: Item, form: PlainForm) -> str | None:
    """The right answer in the form in which answers are compared."""
    return "ABCDEFGH"[item.right] if form == "choice" else answer_in(item.answers[0], form)


def prompts(task: Task, setting: Setting, num: int) -> tuple[list[str], list[str | None]]:
    """Prompts and right answers of the odd half; the examples are of the even half."""
    shown = task.chosen("even", setting.shots)
    answers = [gold(i, setting.form) if setting.form == "choice" else i.answers[0] for i in shown]
    examples = "".join(
        f"{asked(item, setting.form)} {text}\n\n" for item, text in zip(shown, answers, strict=True)
    )
    items = task.chosen("odd", num)
    return [examples + asked(item, setting.form) for item in items], [gold(item, setting.form) for item in items]


def answer(llm: LLM, model: str, label: str, setting: Setting, num: int) -> Answered:
    """All questions of a task by one model."""
    task = load_task(setting.task, DATA / setting.file, skip_bad=True)
    texts, right = prompts(task, setting, num)
    params = [
        SamplingParams(
            max_tokens=setting.params.max_tokens,
            temperature=setting.params.temperature,
            stop=setting.params.stop,
            seed=rank,
        )
        for rank in range(len(texts))
    ]
    start = time.perf_counter()
    done = llm.generate(texts, params, model)
    seconds = time.perf_counter() - start
    hits = [answer_in(each.text, setting.form) == wanted for each, wanted in zip(done, right, strict=True)]
    return Answered(
        label, torch.tensor(hits, dtype=torch.float64), sum(each.num_generated for each in done), seconds
    )


def rows(task: str, found: Sequence[Answered]) -> list[TableRow]:
    """Accuracy of each model, and its difference from the best single member's."""
    counts = draws(len(found[0].right))
    ratios = {each.model: Ratio(each.right, torch.ones_like(each.right)) for each in found}
    best = max(("gemma3", "smollm2"), key=lambda name: ratios[name].value)
    made: list[TableRow] = []
    for each in found:
        value = interval(ratios[each.model], counts)
        other = paired_interval(ratios[each.model], ratios[best], counts)
        made.append(
            {
                "task": task,
                "model": each.model,
                "accuracy": value.value,
                "95 % interval": f"{value.low:.3f} .. {value.high:.3f}",
                f"against {best}": f"{other.value:+.3f} ({other.low:+.3f} .. {other.high:+.3f})",
                "tokens": each.num_tokens,
                "seconds": each.seconds,
            }
        )
    return made


def main() -> None:
    """Ask everybody everything."""
    parser = arguments(__doc__, config=False)
    parser.add_argument("--arc", type=int, default=100, help="questions of ARC")
    parser.add_argument("--gsm8k", type=int, default=40, help="questions of GSM8K")
    args = parser.parse_args()
    sizes: dict[str, int] = {"arc": 6, "gsm8k": 3} if args.quick else {"arc": args.arc, "gsm8k": args.gsm8k}
    tables: dict[str, Any] = {}
    with closing(LLM(configuration([setting.form for setting in SETTINGS]))) as llm:
        for setting in SETTINGS:
            models = [(name, name) for name in _SINGLE] + [(_name(v, setting.form), v) for v in _VOTES]
            found = [answer(llm, model, label, setting, sizes[setting.task]) for model, label in models]
            tables[setting.task] = rows(setting.task, found)
    Findings("votes", tables, settings={**sizes, "temperature of samples": 0.7, "quick": args.quick}).print()


if __name__ == "__main__":
    main()

"""What a user reads: whole answers of members, of the ensemble in each of its ways, and of one member asked twice.

    python -m studies.whole_answers [--questions 24] [--prose 16] [--ways LABEL ...] [--seconds 420] [--quick]

Questions of the five development tasks with four answered examples, up to an empty line; and openings of free prose
without examples, up to the end of text. Answers have at most 256 tokens, greedy and sampled at 0.7 with the record's
own seed. Counted are exact match, words that no dictionary has (Debian's `wamerican`), repetition and length;
intervals are 95 % by bootstrap over documents, differences are paired and to the member that is best at this very
figure. The fair rival costs what the pair costs: one member writes two samples, and the one that it finds likelier is
taken, since two cannot outvote each other.

Answers are kept in the cache, 32 at a time, so that a run that was cut off goes on, and one of more documents keeps
what there is. They are found again for the same configuration and prompts; the cache does not know the code, so give
another --cache where that has changed what is written. --seconds: begin nothing after so long; run again to go on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.ledger import Findings, arguments, results_folder
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import Overrides, Weighting
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation.journal import Journal
from ensemble_core.evaluation.tasks import Item, Task
from ensemble_core.llm import LLM, Completion
from studies.answer_metrics import LABELS, AnswerCounts, Opening, Written, likelier, read
from studies.answer_tables import Comparison, draw, tables
from studies.halves import CACHE, DATA, load_tasks
from studies.positions import dictionary

SHOTS = 4
SAMPLED = 0.7  # temperature
MANNERS = {"greedy": 0.0, "sampled": SAMPLED}
CHUNK = 32  # answers that are written together and kept
STOPS = {"questions": ("\n\n", "Question:"), "prose": ()}
# kind -> the task whose questions open it, and how
PROSE = {
    "solution": ("gsm8k", "Question: {}\nAnswer: Let's think step by step."),
    "article": ("nq", "Write a short article about this question: {}?\n\n"),
    "instructions": ("piqa", "Write instructions for a beginner. The goal: {}\n\n"),
}


@dataclass(frozen=True, slots=True)
class Way:
    """A way to answer. samples: of an opening, where it is sampled; greedy: whether it is also asked greedily."""

    label: str
    model: str
    overrides: Overrides = field(default_factory=Overrides)
    samples: int = 1
    greedy: bool = True

    def number(self, temperature: float) -> int:
        """Answers to one opening."""
        return self.samples if temperature else int(self.greedy)


MEMBERS = ("gemma3", "smollm2")
WAYS = (
    *(Way(member, member, samples=2) for member in MEMBERS),
    Way("duet, all places", "duet"),
    Way("duet, shared places", "duet", Overrides(mode="lockstep", mode_options={"positions": "shared"})),
    Way("duet, verify", "duet-verify"),
    Way("duet, sampled", "duet-sampled", greedy=False),  # greedy requests of this mode are served by verify
    Way("duet, perplexity", "duet", Overrides(weighting=Weighting("perplexity"))),
)
_LABELS = [way.label for way in WAYS if way.model not in MEMBERS]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is written. questions: of each task; prose: of each kind; tokens: of an answer, at most."""

    questions: int = 24
    prose: int = 16
    tokens: int = 256


def asked(task: Task, item: Item) -> str:
    """A question as models read it; options have letters."""
    if task.kind != "choice":
        return item.prompt
    options = "\n".join(f"{LABELS[rank]}. {text}" for rank, text in enumerate(item.options))
    return f"Question: {item.question}\n{options}\nAnswer:"


def questions(task: Task, num: int) -> list[Opening]:
    """Questions of the odd half behind examples of the even one."""
    examples = "".join(
        f"{asked(task, item)} {LABELS[item.right] if task.kind == 'choice' else item.answers[0]}\n\n"
        for item in task.chosen("even", SHOTS)
    )
    return [
        Opening(task.name, item.index, examples + asked(task, item), item, task.kind)
        for item in task.chosen("odd", num)
    ]


def prose(tasks: Sequence[Task], num: int) -> list[Opening]:
    """Openings made of questions of the odd half."""
    by_name = {task.name: task for task in tasks}
    return [
        Opening(kind, item.index, form.format(item.question.strip(" ?")))
        for kind, (task, form) in PROSE.items()
        for item in by_name[task].chosen("odd", num)
    ]


@dataclass(frozen=True, slots=True)
class Series:
    """The answers of one way to openings of one set. sample: 0 is the first of an opening."""

    way: Way
    texts: str
    manner: str
    sample: int

    def params(self, opening: Opening, tokens: int) -> SamplingParams:
        """Of a request. Members report log-probabilities, which change nothing of what one member writes."""
        return SamplingParams(
            max_tokens=tokens,
            temperature=MANNERS[self.manner],
            stop=STOPS[self.texts],
            seed=1000 * self.sample + opening.index,
            logprobs=0 if self.way.model in MEMBERS else None,
        )


class Notebook:
    """Answers, kept as they are written."""

    def __init__(
        self,
        config: Config,
        ways: Sequence[Way],
        tokens: int,
        folder: Path,
        sets: Mapping[str, Sequence[Opening]],
    ) -> None:
        self.ways, self.sets = ways, sets
        self._config, self._tokens = config, tokens
        self._journal = Journal(folder, {}, resume=True)

    def write(self, until: float) -> None:
        """Everything that is not there. Raises SystemExit where `until`, of the monotonic clock, is over before."""
        parts = list(self._missing())
        if not parts:
            return
        number = sum(len(openings) for _, openings in parts)
        with closing(LLM(self._config)) as llm, tqdm(total=number, unit="answer", disable=None) as bar:
            for place, (series, openings) in enumerate(parts):
                if time.monotonic() > until:
                    raise SystemExit(f"whole_answers: {len(parts) - place} parts are left; run it again to go on")
                bar.set_description(f"{series.way.label}, {series.texts}, {series.manner}")
                self._keep(series, openings, self._written(llm, series, openings))
                bar.update(len(openings))

    def answers(self, series: Series) -> list[Written]:
        """What was written, in the order of the openings."""
        return [Written(**self._found(series, each)) for each in self.sets[series.texts]]

    def _missing(self) -> Iterator[tuple[Series, list[Opening]]]:
        """What is still to be written, in parts."""
        for way, texts, (manner, temperature) in itertools.product(self.ways, self.sets, MANNERS.items()):
            for sample in range(way.number(temperature)):
                series = Series(way, texts, manner, sample)
                left = [each for each in self.sets[texts] if not self._found(series, each)]
                yield from ((series, left[start : start + CHUNK]) for start in range(0, len(left), CHUNK))

    def _written(self, llm: LLM, series: Series, openings: Sequence[Opening]) -> list[Written]:
        params = [series.params(each, self._tokens) for each in openings]
        prompts = [each.prompt for each in openings]
        done = llm.generate(prompts, params, series.way.model, series.way.overrides)
        return [_kept(each, own) for each, own in zip(done, params, strict=True)]

    def _keep(self, series: Series, openings: Sequence[Opening], written: Sequence[Written]) -> None:
        for opening, answer in zip(openings, written, strict=True):
            self._journal.add(self._key(series, opening), {opening.index: asdict(answer)})

    def _found(self, series: Series, opening: Opening) -> Mapping[str, Any]:
        return self._journal.items(self._key(series, opening)).get(opening.index, {})

    def _key(self, series: Series, opening: Opening) -> tuple[str, str, str]:
        way = series.way
        recipe = self._config.ensembles.get(way.model)
        asked = {name: value for name, value in asdict(way.overrides).items() if value is not None}
        made_from = _digest([way.model, asked, recipe and recipe.model_dump(mode="json", exclude_defaults=True)])
        return f"{way.label} {made_from}", opening.kind, f"{series.texts}, {series.manner} {series.sample}"


def _kept(done: Completion, params: SamplingParams) -> Written:
    nats = None if params.logprobs is None else -sum(each.logprob or 0.0 for each in done.logprobs)
    return Written(done.text, len(done.token_ids), done.finish_reason == "stop", nats)


def _digest(made_from: object) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:12]


def cache_of(config: Config, tasks: Sequence[Task], tokens: int, root: Path) -> Path:
    """The folder of answers that were made from this configuration, these tasks and prompts."""
    members = {name: each.model_dump(mode="json", exclude_defaults=True) for name, each in config.members.items()}
    matrices = config.matrices.model_dump(mode="json", exclude={"folder"})
    made_from = [members, matrices, config.scheduler.num_candidates]
    made_from += [[[task.name, task.digest] for task in tasks], PROSE, SHOTS, STOPS, SAMPLED, tokens]
    return root.expanduser() / f"whole_answers.{_digest(made_from)}"


def comparison(notebook: Notebook, texts: str, manner: str, known: frozenset[str]) -> Comparison:
    """Everybody's answers, and those of members that choose among two."""
    entries: dict[str, list[Written]] = {}
    for way in notebook.ways:
        drawn = [notebook.answers(Series(way, texts, manner, each)) for each in range(way.number(MANNERS[manner]))]
        entries |= {way.label: drawn[0]} if drawn else {}
        entries |= rivals(way.label, drawn) if len(drawn) > 1 else {}
    counts: dict[str, list[AnswerCounts]] = {
        label: [read(*pair, known) for pair in zip(notebook.sets[texts], written, strict=True)]
        for label, written in entries.items()
    }
    return Comparison(texts, manner, notebook.sets[texts], counts, MEMBERS)


def rivals(label: str, drawn: Sequence[Sequence[Written]]) -> dict[str, list[Written]]:
    """Each opening's likelier sample: as a whole, which favours short ones, and by token, which favours loops."""
    rules = {"likelier": False, "likelier by token": True}
    return {
        f"{len(drawn)} x {label}, {name}": [likelier(each, per_token) for each in zip(*drawn, strict=True)]
        for name, per_token in rules.items()
    }


def main() -> None:
    """Write, read, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of finished answers")
    parser.add_argument("--questions", type=int, default=Extent().questions, help="questions of each task")
    parser.add_argument("--prose", type=int, default=Extent().prose, help="openings of each kind of prose")
    parser.add_argument(
        "--ways", nargs="+", choices=_LABELS, default=_LABELS, help="of the ensemble, beside members"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    extent = Extent(2, 1, 12) if args.quick else Extent(args.questions, args.prose)
    config, tasks, known = load_config(args.config), load_tasks(args.data), dictionary()
    sets = {
        "questions": [each for task in tasks for each in questions(task, extent.questions)],
        "prose": prose(tasks, extent.prose),
    }
    ways = [way for way in WAYS if way.model in MEMBERS or way.label in args.ways]
    notebook = Notebook(config, ways, extent.tokens, cache_of(config, tasks, extent.tokens, args.cache), sets)
    notebook.write(until)
    found = [comparison(notebook, texts, manner, known) for texts in sets for manner in MANNERS]
    draw(found, results_folder("studies", args.quick) / "whole_answers.png")
    settings = {"quick": args.quick, **asdict(extent), "shots": SHOTS, "temperature of samples": SAMPLED}
    Findings("whole_answers", tables(found), settings=settings).print()


if __name__ == "__main__":
    main()

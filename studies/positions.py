"""What fusing costs where an assistant stands in the middle of one of its own tokens.

    python -m studies.positions [--part words|bits|gsm8k] [--quick]

Lockstep at `all` places fuses after each token of main. The same fusion at `shared` places, and `verify` (shared
places that are needed), leave the others to main. For either main, and for main alone:

words: greedy and sampled answers to questions of three kinds: the share of places where not every assistant has a
boundary, and of words that no dictionary has (/usr/share/dict/words, Debian's `wamerican`; names in capitals and
words of the prompt do not count). bits: bits per byte of reference answers, which each rule reads token by token.
gsm8k: exact match with four worked examples. Differences are paired over documents, with 95 % intervals by bootstrap.
Each part keeps its rows, so that parts can be run apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.ledger import ROOT, Findings, TableRow, arguments, results_folder
from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation.answers import same_number
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval, paired_interval
from ensemble_core.llm import LLM, Completion
from ensemble_core.members.base import Candidates, Feed, Member, ask, stacked
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.vocabulary import Vocabulary

DATA = ROOT.parent / "shared" / "data"
DICTIONARY = Path("/usr/share/dict/words")
ENSEMBLES = ("duet", "duet-smollm2")
PARTS = ("words", "bits", "gsm8k")
_WORD = re.compile(r"(?<![A-Za-z'’])[A-Za-z]+(?![A-Za-z])")
_SEQ_ID = 10**9  # of feeds by hand


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to answer. mode: None for a member alone."""

    name: str
    model: str
    mode: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def overrides(self) -> Overrides:
        """As a request says it."""
        return Overrides(mode=self.mode, mode_options=dict(self.options) or None)


def rules(model: str, members: Sequence[str]) -> list[Rule]:
    """All ways for one ensemble, `all` first, its members after them."""
    shared = (("positions", "shared"),)
    return [
        Rule("lockstep, all", model, "lockstep"),
        Rule("lockstep, shared", model, "lockstep", shared),
        Rule("verify", model, "verify"),
        *(Rule(f"{member} alone", member) for member in members),
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run."""

    answers: int = 96
    tokens: int = 128
    documents: int = 150
    questions: int = 96
    solution: int = 200  # tokens of an answer to GSM8K


QUICK = Plan(answers=3, tokens=12, documents=2, questions=2, solution=16)


def items(task: str) -> list[dict[str, Any]]:
    """A development set."""
    return [json.loads(line) for line in (DATA / f"{task}_dev.jsonl").read_text(encoding="utf-8").splitlines()]


def before_end(assistant: Vocabulary, before: str, text: str) -> int | None:
    """How many of the assistant's tokens for `text` spell `before`; None where none ends there."""
    ids, left = assistant.encode(text), len(text[len(before) :].encode())
    count = len(ids)
    while left > 0 and count:
        count -= 1
        left -= len(assistant.text_bytes(ids[count]))
    return count if left == 0 else None


def unknown_words(text: str, prompt: str, known: frozenset[str]) -> tuple[int, int]:
    """Words that no dictionary has, and all words: runs of small ASCII letters but for the last, which may go on."""
    told = {word.lower() for word in _WORD.findall(prompt)}
    plain = [word for word in _WORD.findall(text)[:-1] if word.islower()]
    return sum(word not in known and word not in told for word in plain), len(plain)


def dictionary() -> frozenset[str]:
    """Its words in small letters. Raises SystemExit where it is missing."""
    if not DICTIONARY.exists():
        raise SystemExit(f"{DICTIONARY} is missing (on Debian: apt install wamerican)")
    words = DICTIONARY.read_text(encoding="utf-8").split()
    return frozenset(word.lower().removesuffix("'s") for word in words)


def prompts(num: int) -> list[str]:
    """Questions of three kinds, in turn."""
    sets = [[item["question"] for item in items(task)] for task in ("nq", "piqa", "gsm8k")]
    return [f"Question: {sets[i % 3][i // 3]}\nAnswer:" for i in range(num)]


class Study:
    """The models, and what is known of each ensemble."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self.config, self.plan = config, plan
        self.llm = LLM(config)
        self._book, self.vocabularies = factory.load_recipes(config)

    def recipe(self, model: str) -> Recipe:
        """Main first."""
        return self._book.resolve(model, Overrides())

    def answers(self, rule: Rule, texts: list[str], params: SamplingParams) -> list[Completion]:
        """What the rule says to some prompts."""
        return self.llm.generate(texts, params, rule.model, rule.overrides)

    def words(self) -> list[TableRow]:
        """Unsound places and unknown words."""
        known, texts = dictionary(), prompts(self.plan.answers)
        rows: list[TableRow] = []
        for temperature in (0.0, 1.0):
            params = SamplingParams(max_tokens=self.plan.tokens, temperature=temperature, seed=1, ignore_eos=True)
            for model in ENSEMBLES:
                rows += self._words(model, texts, params, known)
        return rows

    def _words(
        self, model: str, texts: list[str], params: SamplingParams, known: frozenset[str]
    ) -> Iterator[TableRow]:
        main, *others = self.recipe(model).members
        reference: Ratio | None = None
        for rule in rules(model, [main]):
            answers = self.answers(rule, texts, params)
            counts = [unknown_words(a.text, text, known) for a, text in zip(answers, texts, strict=True)]
            ratio = ratio_of(counts)
            reference = reference or ratio
            shared = [
                spellings(a.token_ids, self.vocabularies[main], self.vocabularies[other])[1]
                for a in answers
                for other in others
            ]
            yield {
                "main": main,
                "temperature": params.temperature,
                "rule": rule.name,
                "unsound places, %": round(100 - 100 * sum(map(sum, shared)) / sum(map(len, shared)), 1),
                "words": int(ratio.denominators.sum()),
                "unknown words, %": told(interval(ratio, draws(len(texts))), 100),
                "against all": told(paired_interval(ratio, reference, draws(len(texts))), 100),
            }

    def bits(self) -> list[TableRow]:
        """Bits per byte of reference answers."""
        kinds: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[str, str]]]] = {
            "GSM8K": ("gsm8k", lambda item: (f"Question: {item['question']}\nAnswer:", f" {item['answer']}")),
            "PIQA": ("piqa", lambda item: (f"Question: {item['question']}\nAnswer:", f" {item[item['answer']]}")),
        }
        rows: list[TableRow] = []
        for kind, (task, pair_of) in kinds.items():
            pairs = [pair_of(item) for item in items(task)[: self.plan.documents]]
            for model in ENSEMBLES:
                reader = Reader(self.llm, self.recipe(model), self.config.scheduler.num_candidates)
                read = [reader.read(*pair) for pair in tqdm(pairs, desc=f"{kind}, {model}", disable=None)]
                sizes = [len(text.encode()) for _, text in pairs]
                rows += self._bits(kind, reader.recipe, read, sizes)
        return rows

    def _bits(
        self, kind: str, recipe: Recipe, read: list[dict[str, float]], sizes: list[int]
    ) -> Iterator[TableRow]:
        reference: Ratio | None = None
        counts = draws(len(read))
        for name in ("all", "shared", "main alone"):
            ratio = ratio_of([(each[name], size) for each, size in zip(read, sizes, strict=True)])
            reference = reference or ratio
            yield {
                "texts": kind,
                "main": recipe.main,
                "rule": name,
                "bits per byte": told(interval(ratio, counts), 1, 4),
                "against all": told(paired_interval(ratio, reference, counts), 1, 4),
            }

    def gsm8k(self) -> list[TableRow]:
        """Exact match with four worked examples."""
        shots, questions = items("gsm8k")[:4], items("gsm8k")[4 : 4 + self.plan.questions]
        head = "\n\n".join(f"Question: {each['question']}\nAnswer: {each['answer']}" for each in shots)
        texts = [f"{head}\n\nQuestion: {each['question']}\nAnswer:" for each in questions]
        params = SamplingParams(max_tokens=self.plan.solution, temperature=0.0, stop=("\nQuestion:", "\n\n"))
        rows: list[TableRow] = []
        for model in ENSEMBLES:
            reference: Ratio | None = None
            for rule in rules(model, [self.recipe(model).main]):
                answers = self.answers(rule, texts, params)
                right = [same_number(a.text, q["answer"]) for a, q in zip(answers, questions, strict=True)]
                ratio = ratio_of([(float(each), 1.0) for each in right])
                reference = reference or ratio
                rows.append(
                    {
                        "main": self.recipe(model).main,
                        "rule": rule.name,
                        "exact match, %": told(interval(ratio, draws(len(texts))), 100),
                        "against all": told(paired_interval(ratio, reference, draws(len(texts))), 100),
                    }
                )
        return rows


class Reader:
    """Reads texts under the rules of generation, token by token of main, as far as each rule fuses."""

    def __init__(self, llm: LLM, recipe: Recipe, num_candidates: int) -> None:
        self.recipe, self._llm, self._num = recipe, llm, num_candidates

    def read(self, prompt: str, text: str) -> dict[str, float]:
        """Bits of `text` after `prompt`: fused at all places, at shared ones alone, and main's own."""
        main, other = self.recipe.members
        vocabulary = self._llm.members[main].vocabulary
        ids = vocabulary.encode(text)
        own = self._behind(main, prompt, [ids[:i] for i in range(len(ids))], [(token_id,) for token_id in ids])
        spelt, shared = spellings(ids, vocabulary, self._llm.members[other].vocabulary)
        parts = [own, self._behind(other, prompt, spelt)]
        assert self.recipe.fusion is not None
        fused = self.recipe.fusion.fuse(parts, torch.tensor([self.recipe.weights]).expand(len(ids), -1))
        alone = _logprobs(own.token_ids, own.logprobs, ids)
        pooled = _logprobs(fused.token_ids, fused.logprobs, ids)
        nats = {"all": pooled, "shared": torch.where(torch.tensor(shared), pooled, alone), "main alone": alone}
        return {name: float(-logs.double().sum()) / math.log(2) for name, logs in nats.items()}

    def _behind(
        self, name: str, prompt: str, prefixes: list[list[int]], also: list[tuple[int, ...]] | None = None
    ) -> Candidates:
        """A member's candidates behind the prompt and each prefix. One forward serves beginnings of the longest."""
        member, head = self._llm.members[name], self._llm.encode(name, prompt)
        longest = max(prefixes, key=len)
        feed = Feed(_SEQ_ID, [*head, *longest], 1 + len(longest), tuple(also or ()))
        whole = self._ask(member, feed)
        parts = [
            whole.rows([len(prefix)])
            if prefix == longest[: len(prefix)]
            else self._ask(member, Feed(_SEQ_ID, [*head, *prefix]))
            for prefix in prefixes
        ]
        return stacked(parts)

    def _ask(self, member: Member, feed: Feed) -> Candidates:
        found = ask(member, [feed], self._num)
        member.release(_SEQ_ID)
        return found


def spellings(ids: Sequence[int], main: Vocabulary, assistant: Vocabulary) -> tuple[list[list[int]], list[bool]]:
    """What the assistant has before each of main's tokens, and whether that place is shared."""
    text, before, shared = Detokenizer(), [], []
    for token_id in ids:
        old, within = text.text, text.mid_character
        text.feed(main.text_bytes(token_id))
        place = None if within else before_end(assistant, old, text.text)
        shared.append(place is not None)
        before.append(assistant.encode(text.text)[:place] if place is not None else assistant.encode(old))
    return before, shared


def _logprobs(token_ids: Tensor, logprobs: Tensor, true: Sequence[int]) -> Tensor:
    """(B,) the log-probability of each row's true id."""
    hits = token_ids == torch.tensor(true).unsqueeze(1)
    return logprobs.masked_fill(~hits, -torch.inf).amax(dim=1)


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Numerators and denominators of documents."""
    above, below = zip(*pairs, strict=True)
    return Ratio(torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64))


def told(found: Interval, scale: float, digits: int = 1) -> str:
    """A value with its interval."""
    value, low, high = (round(scale * each, digits) for each in (found.value, found.low, found.high))
    return f"{value} ({low} .. {high})"


def measure(config: Config, plan: Plan, parts: Sequence[str], quick: bool) -> Findings:
    """The parts asked for; the others as they were kept."""
    kept = results_folder("studies", quick) / "positions.json"
    tables = dict(json.loads(kept.read_text())["tables"]) if kept.exists() and not quick else {}
    study = Study(config, plan)
    run = {"words": study.words, "bits": study.bits, "gsm8k": study.gsm8k}
    tables |= {part: run[part]() for part in parts}
    settings = {"quick": quick, "answers": plan.answers, "tokens": plan.tokens, "questions": plan.questions}
    return Findings("positions", {part: tables[part] for part in PARTS if part in tables}, settings=settings)


def main() -> None:
    """Measure, tell, keep."""
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given again")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    measure(load_config(args.config), plan, args.part or PARTS, args.quick).print()


if __name__ == "__main__":
    main()

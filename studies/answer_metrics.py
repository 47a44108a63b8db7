"""What can be told of a written answer by reading it: words, repetition, length, and whether it is right.

Repetition is counted in the text, not in tokens, so that models with different tokenizers can be compared. Knows
texts; does not know models.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ensemble_core.councils.answers import answer_in
from ensemble_core.evaluation.answers import exact_match, same_number
from ensemble_core.evaluation.tasks import Item, TaskKind
from studies.positions import unknown_words

GRAM = 4  # words of a gram
COPIES = 3  # a loop has at least so many copies of its unit,
LOOP = 48  # and so many characters
LABELS = "ABCDEFGH"
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Written:
    """An answer. ended: by itself, not by the limit. nats: -log p of its tokens in the model that wrote it."""

    text: str
    num_tokens: int
    ended: bool
    nats: float | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What is to be continued. kind: of which texts; index: of the record; item, form: a question's."""

    kind: str
    index: int
    prompt: str
    item: Item | None = None
    form: TaskKind = "text"

    def is_right(self, text: str) -> bool:
        """Whether a text answers the question: its first line, its last number or its label."""
        match self.form, self.item:
            case "choice", Item() as item:
                return answer_in(text, "choice") == LABELS[item.right]
            case "number", Item() as item:
                return same_number(text, item.answers[0])
            case "answer", Item() as item:
                return exact_match(text.strip().partition("\n")[0], item.answers)
        return False


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """The counts of one answer; figures are ratios of their sums."""

    right: float
    unknown: float
    words: float
    distinct: float
    grams: float
    looped: float
    ended: float
    tokens: float
    size: float
    answers: float = 1.0


@dataclass(frozen=True, slots=True)
class Feature:
    """A figure of many answers. better: which way; "" where neither is. scale: of what is shown."""

    name: str
    numerator: str
    denominator: str
    better: Literal["more", "less", ""]
    scale: float = 100.0


RIGHT = Feature("exact match, %", "right", "answers", "more")
UNKNOWN = Feature("non-words, %", "unknown", "words", "less")
DISTINCT = Feature("distinct 4-grams, %", "distinct", "grams", "more")
LOOPS = Feature("end in a loop, %", "looped", "answers", "less")
ENDED = Feature("end by themselves, %", "ended", "answers", "")
TOKENS = Feature("tokens", "tokens", "answers", "", 1.0)
SIZE = Feature("bytes", "size", "answers", "", 1.0)


def read(opening: Opening, written: Written, known: frozenset[str]) -> AnswerCounts:
    """Count one answer. known: the dictionary."""
    unknown, num_words = unknown_words(written.text, opening.prompt, known)
    distinct, grams = distinct_grams(written.text)
    return AnswerCounts(
        right=opening.is_right(written.text),
        unknown=unknown,
        words=num_words,
        distinct=distinct,
        grams=grams,
        looped=ends_in_loop(written.text),
        ended=written.ended,
        tokens=written.num_tokens,
        size=len(written.text.encode()),
    )


def distinct_grams(text: str) -> tuple[int, int]:
    """Different runs of four words or marks, and all such runs."""
    pieces = _PIECE.findall(text)
    grams = list(zip(*(pieces[start:] for start in range(GRAM)), strict=False))
    return len(set(grams)), len(grams)


def ends_in_loop(text: str) -> bool:
    """Whether the end is one unit again and again, the last copy perhaps cut off. Looks at every unit's length."""
    text = text.rstrip()
    return any(
        _periodic(text, period) >= max(COPIES * period, LOOP) for period in range(1, len(text) // COPIES + 1)
    )


def _periodic(text: str, period: int) -> int:
    """How many characters at the end repeat with this period, the first copy included."""
    pairs = zip(reversed(text), reversed(text[:-period]), strict=False)
    return period + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def likelier(samples: Sequence[Written], per_token: bool) -> Written:
    """The sample that its own model finds likeliest, as a whole or by token; of equals the first.

    Two samples cannot outvote each other: where they agree either will do, and where they do not it is a tie.
    """
    return min(samples, key=lambda each: _nats(each) / (max(each.num_tokens, 1) if per_token else 1))


def _nats(written: Written) -> float:
    assert written.nats is not None, "samples to choose from are kept with their likelihood"
    return written.nats

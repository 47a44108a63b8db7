"""What the answers of a vote agree in: the option, number or words that a text ends up with.

Knows texts alone. A text without an answer of the wanted kind has none, and its vote is not counted.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from ensemble_core.text.answers import last_number, normalised

PlainForm = Literal["choice", "number", "exact"]
AnswerForm = PlainForm | Literal["math"]

# Where a text announces its answer, the last announcement counts; what stands before may discuss other options.
_ANNOUNCED = re.compile(
    r"(?:answer|option|choice)\b(?: is| would be|:|\*\*:)*[\s:*$(\[{\"']*(?P<found>[^\n]{1,64})", re.I
)
_BOXED = re.compile(r"\\boxed\{(?P<found>[^{}]{1,64})\}")
# Labels go up to H, since I is a word; A is one only where no mark follows it.
_LABEL = re.compile(r"^(?:\\text\{)?([A-H])(?![\w'])")
_FIRST = re.compile(r"^[(*\s]*([A-H])(?:[.):*]|\s*$)")
_LONE_LABEL = re.compile(r"(?<![\w'])(?:\(([A-H])\)|([A-H])(?=[.):]|\s*$))", re.MULTILINE)
_MARKED = re.compile(r"####\s*(?P<found>[^\n]{1,64})")


def answer_in(text: str, kind: PlainForm) -> str | None:
    """The answer of a text in the form in which answers are compared; None: there is none."""
    match kind:
        case "choice":
            return _choice(text)
        case "number":
            return _number(text)
        case "exact":
            return normalised(text) or None


def _announced(text: str) -> list[str]:
    """What follows the words that announce an answer, last first."""
    found = [*_MARKED.finditer(text), *_BOXED.finditer(text), *_ANNOUNCED.finditer(text)]
    return [each["found"].strip() for each in sorted(found, key=lambda each: each.start(), reverse=True)]


def _choice(text: str) -> str | None:
    """The announced label; else the label that the text begins with; else the last one that stands alone."""
    for found in _announced(text):
        if label := _LABEL.match(found):
            return label[1]
    if label := _FIRST.match(text):
        return label[1]
    alone = _LONE_LABEL.findall(text)
    return (alone[-1][0] or alone[-1][1]) if alone else None


def _number(text: str) -> str | None:
    """The announced number, the first of what is announced; else the last of the text."""
    for found in _announced(text):
        first = re.search(r"-?\$?\s?-?[\d,]*\.?\d+", found)
        if first and (number := last_number(first[0].replace("$", "").replace(" ", ""))) is not None:
            return _plain(number)
    number = last_number(text)
    return None if number is None else _plain(number)


def _plain(number: Decimal) -> str:
    """12, 12.0 and 1.2e1 are one answer."""
    if number == 0:
        return "0"
    return format(number.normalize(), "f") if abs(number.adjusted()) < 100 else str(number.normalize())

"""Whether a completion is right: exact match after normalisation, and the last number.

Knows texts alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from ensemble_core.evaluation.tasks import FINAL_NUMBER

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’´`“”")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def normalised(text: str) -> str:
    """As SQuAD and TriviaQA score: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(completion: str, answers: Sequence[str]) -> bool:
    """Whether a completion is one of the accepted answers after normalisation."""
    return normalised(completion) in {normalised(answer) for answer in answers} - {""}


def last_number(text: str) -> Decimal | None:
    """The last number of a text; separators of thousands do not count."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def same_number(completion: str, solution: str) -> bool:
    """Whether a completion's last number is the one that the solution ends with."""
    final = FINAL_NUMBER.search(solution)
    expected = last_number(final[1]) if final else None
    return expected is not None and last_number(completion) == expected

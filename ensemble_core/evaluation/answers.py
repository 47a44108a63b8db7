"""Whether a completion is right: exact match after normalisation, and the last number.

Knows texts alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_core.evaluation.tasks import FINAL_NUMBER
from ensemble_core.text.answers import last_number, normalised


def exact_match(completion: str, answers: Sequence[str]) -> bool:
    """Whether a completion is one of the accepted answers after normalisation."""
    return normalised(completion) in {normalised(answer) for answer in answers} - {""}


def same_number(completion: str, solution: str) -> bool:
    """Whether a completion's last number is the one that the solution ends with."""
    final = FINAL_NUMBER.search(solution)
    expected = last_number(final[1]) if final else None
    return expected is not None and last_number(completion) == expected

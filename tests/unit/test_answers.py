"""Whether completions are right."""

from __future__ import annotations

from decimal import Decimal

import pytest

from ensemble_core.evaluation.answers import exact_match, same_number
from ensemble_core.text.answers import last_number, normalised


def test_normalisation_is_squads() -> None:
    assert normalised("  The  “Quick”, brown-fox!\n") == "quick brownfox"
    assert normalised("An apple a day") == "apple day"
    assert normalised("Theatre") == "theatre"


@pytest.mark.parametrize(
    ("completion", "right"), [("the Ann.", True), ("ANNE", True), ("Ann Lee", False), ("", False), ("the", False)]
)
def test_any_accepted_answer_matches(completion: str, right: bool) -> None:
    assert exact_match(completion, ["Ann", "Anne", "the"]) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 apples and 1,250.50 dollars.", "1250.50"),
        ("it is -7", "-7"),
        ("$.5", "0.5"),
        ("6, 12, 18", "18"),
        ("none", None),
    ],
)
def test_the_last_number_counts(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_as_numbers() -> None:
    solution = "2 + 2 = 4\nTherefore, the answer is 1,200"
    assert same_number("first 4, then the answer is 1200.0 dollars", solution)
    assert not same_number("1200 and 4", solution)
    assert not same_number("nothing", solution)
    assert same_number("12", "work\n#### 12")

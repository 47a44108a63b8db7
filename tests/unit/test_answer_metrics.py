"""What the study of whole answers counts in a text, which of two samples it takes, and what its tables compare."""

from __future__ import annotations

import pytest

from ensemble_core.evaluation.tasks import Item
from studies.answer_metrics import (
    DISTINCT,
    LOOPS,
    RIGHT,
    UNKNOWN,
    AnswerCounts,
    Opening,
    Written,
    distinct_grams,
    ends_in_loop,
    likelier,
    read,
)
from studies.answer_tables import FEATURES, Comparison, tables

KNOWN = frozenset({"the", "cat", "sat", "on", "a", "mat", "and"})
OPENING = Opening("article", 1, "Write about the zorblax.")
CHOICE = Item(0, 1, "Which?", ("blue",), ("red", "blue"), 1)
NUMBER = Item(0, 1, "How many?", ("Two and two. The answer is 1,004.",))
NAMED = Item(0, 1, "Who?", ("Sally Jane Bruce", "S. J. Bruce"))


def test_distinct_grams_are_of_words_and_marks() -> None:
    assert distinct_grams("one two three") == (0, 0)
    assert distinct_grams("one two three four five") == (2, 2)
    assert distinct_grams("a b c d a b c d") == (4, 5)  # a b c d stands there twice
    assert distinct_grams("stop. now, go") == (2, 2)  # marks count, spaces do not
    assert distinct_grams("stop . now ,go") == (2, 2)


def test_a_loop_has_three_copies_and_48_characters() -> None:
    unit = "The cat sat on the mat. "
    assert ends_in_loop("Once upon a time. " + 3 * unit + "The cat")
    assert not ends_in_loop("Once upon a time. " + 2 * unit + "The cat")
    assert ends_in_loop("Well" + 48 * "!")
    assert not ends_in_loop("Well" + 47 * "!")
    assert ends_in_loop("The digits: " + 60 * "0 " + "\n\n")  # white space at the end does not hide it


def test_what_loops_and_goes_on_ends_otherwise() -> None:
    unit = "The cat sat on the mat. "
    assert not ends_in_loop(5 * unit + "Then it left the house and was never seen again.")
    assert not ends_in_loop("".join(f"{number}. The cat sat on the mat.\n" for number in range(10, 20)))
    assert not ends_in_loop("")


def test_words_of_the_opening_are_no_non_words() -> None:
    found = read(OPENING, Written("the zorblax sat on a matt and", 7, ended=False), KNOWN)
    assert (found.unknown, found.words) == (1, 6)  # matt; the last word may be cut off


def test_a_reading_counts_tokens_bytes_and_the_end() -> None:
    found = read(OPENING, Written("café", 3, ended=True), KNOWN)
    assert (found.tokens, found.size, found.ended, found.looped, found.right) == (3, 5, 1, 0, 0)


@pytest.mark.parametrize(
    ("form", "item", "text", "right"),
    [
        ("choice", CHOICE, " B", True),
        ("choice", CHOICE, " A", False),
        ("choice", CHOICE, " blue", False),
        ("number", NUMBER, " 4 + 1000 = 1004", True),
        ("number", NUMBER, " 1004 - 4 = 1000", False),
        ("answer", NAMED, " sally jane bruce.\nShe also", True),
        ("answer", NAMED, " Sally Jane Bruce, who also", False),
    ],
)
def test_right_answers(form: str, item: Item, text: str, right: bool) -> None:
    opening = Opening("task", 0, "Question:", item, form)  # type: ignore[arg-type]
    assert opening.is_right(text) is right


def test_of_two_samples_the_likelier_one_is_taken() -> None:
    short, long = Written("a", 2, True, nats=4.0), Written("a b c", 10, True, nats=5.0)
    assert likelier([long, short], per_token=False) is short
    assert likelier([long, short], per_token=True) is long


def test_of_equally_likely_samples_the_first_one_is_taken() -> None:
    first, second = Written("a", 2, True, nats=4.0), Written("b", 2, True, nats=4.0)
    assert likelier([first, second], per_token=False) is first
    assert likelier([second, first], per_token=True) is second


def test_an_answer_without_tokens_can_be_compared() -> None:
    empty, text = Written("", 0, True, nats=0.0), Written("a", 1, True, nats=0.1)
    assert likelier([text, empty], per_token=True) is empty


def _counts(right: float, looped: float, unknown: float = 0.0) -> AnswerCounts:
    return AnswerCounts(right, unknown, 10.0, 8.0, 10.0, looped, 1.0, 5.0, 20.0)


def _comparison(texts: str = "questions") -> Comparison:
    """`sure` is right more often, `calm` loops less; `both` is as right as the one and loops as the other."""
    openings = [Opening(kind, index, "Question:") for kind in ("nq", "arc") for index in range(2)]
    counts = {
        "sure": [_counts(1, 1), _counts(1, 1), _counts(1, 1), _counts(0, 1)],
        "calm": [_counts(0, 0), _counts(0, 0), _counts(1, 0), _counts(0, 0)],
        "both": [_counts(1, 0), _counts(1, 0), _counts(1, 1), _counts(0, 1)],
    }
    return Comparison(texts, "greedy", openings, counts, ("sure", "calm"))


def test_the_best_member_is_chosen_figure_by_figure_and_never_an_ensemble() -> None:
    comparison = _comparison()
    assert (comparison.best(RIGHT), comparison.best(LOOPS)) == ("sure", "calm")
    assert comparison.difference("sure", RIGHT) is None
    difference = comparison.difference("both", LOOPS)
    assert difference is not None
    assert difference.value == 0.5


def test_differences_are_paired() -> None:
    """`both` is right where `sure` is, so no draw of documents tells them apart; unpaired they would differ."""
    difference = _comparison().difference("both", RIGHT)
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_rows_by_kind_are_of_that_kind_alone() -> None:
    rows = {row["answers"]: row for row in _comparison().by_kind(RIGHT)}
    assert (rows["both"]["nq"], rows["both"]["arc"]) == (100.0, 50.0)


def test_tables_have_a_row_for_everybody_and_differences_of_what_has_a_better_side() -> None:
    found = tables([_comparison("questions"), _comparison("prose")])
    assert [row["answers"] for row in found["questions, greedy"]] == ["sure", "calm", "both"]
    columns = list(found["prose, greedy, against the best member"][0])
    assert columns == ["answers", UNKNOWN.name, DISTINCT.name, LOOPS.name]
    assert RIGHT not in FEATURES["prose"]

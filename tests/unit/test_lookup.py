"""Guesses from where a text's last tokens occurred before."""

from __future__ import annotations

import random

from ensemble_core.text.lookup import Lookup


def grown(ids: list[int]) -> Lookup:
    lookup = Lookup()
    while len(lookup) < len(ids):
        lookup.grow(ids[len(lookup) :])
    return lookup


def slow(ids: list[int], end: list[int], count: int) -> tuple[int, list[int]]:
    """The rule by search."""
    for length in (3, 2):
        places = [i for i in range(length, len(ids)) if ids[i - length : i] == end[-length:]]
        if len(end) >= length and places:
            return length, ids[places[-1] : places[-1] + count]
    return 0, []


def test_equals_a_search() -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(4) for _ in range(rng.randrange(30))]
        end = [rng.randrange(4) for _ in range(rng.randrange(5))]
        length, found = grown(ids).guess(end, 5)
        assert (length, list(found)) == slow(ids, end, 5)


def test_a_long_prompt_is_taken_in_bit_by_bit() -> None:
    lookup, ids = Lookup(), [i % 97 for i in range(10_000)]
    lookup.grow(ids)
    assert 0 < len(lookup) < len(ids)
    assert grown(ids).guess(ids[:3], 4)[1] == ids[3:7]


def test_an_empty_text_has_no_guesses() -> None:
    assert Lookup().guess([], 3) == (0, ())

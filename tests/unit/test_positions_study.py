"""What the study of positions counts."""

from __future__ import annotations

from fakes import byte_vocabulary

from studies.positions import before_end, spellings, unknown_words

MAIN = byte_vocabulary(["abc"])
OTHER = byte_vocabulary(["ab", "cd"])


def test_places_within_a_token_of_the_assistant_are_unsound() -> None:
    """ "abcd" is a, b, c, d or abc, d to main, and ab, cd to the assistant."""
    letters = [MAIN.encode(letter)[0] for letter in "abcd"]
    assert spellings(letters, MAIN, OTHER)[1] == [True, False, True, False]
    assert spellings([MAIN.encode("abc")[0], letters[3]], MAIN, OTHER)[1] == [True, False]


def test_places_within_a_character_are_unsound() -> None:
    assert spellings(MAIN.encode("é"), MAIN, OTHER)[1] == [True, False]


def test_what_the_assistant_has_before_each_token() -> None:
    letters = [MAIN.encode(letter)[0] for letter in "abcd"]
    before, shared = spellings(letters, MAIN, OTHER)
    assert [b"".join(map(OTHER.text_bytes, ids)) for ids in before] == [b"", b"a", b"ab", b"abc"]
    assert shared == [True, False, True, False]
    assert before_end(OTHER, "ab", "abcd") == 1
    assert before_end(OTHER, "a", "ab") is None


def test_unknown_words_are_of_small_letters_and_not_of_the_prompt() -> None:
    known = frozenset({"the", "cat", "sat"})
    assert unknown_words("The cat satt on Mars zorblax the en", "Who is zorblax?", known) == (2, 5)
    assert unknown_words("", "", known) == (0, 0)

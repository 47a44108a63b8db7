"""Text from bytes: the same whatever the pieces, stop strings cut and never shown, against a slow reference."""

from __future__ import annotations

import codecs
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemble_core.text.detokenizer import Detokenizer

# A small alphabet makes stop strings match, overlap and almost match.
texts = st.lists(st.sampled_from(["a", "b", "ab", "aab", "é", "中", "😀", "\n"]), max_size=30).map("".join)
stops = st.lists(st.text("abé中😀\n\ufffd", min_size=1, max_size=5), max_size=4).map(tuple)
data = texts.map(str.encode) | st.binary(max_size=24)


def reference(raw: bytes, stop_strings: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first stop string that is complete, of two at once the longer."""
    whole = raw.decode("utf-8", "replace")
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stop_strings if whole[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return whole[: end - len(stop)], stop
    return whole, None


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    return [raw[a:b] for a, b in pairwise(places)]


@settings(max_examples=400, deadline=None)
@given(raw=data, stop_strings=stops, cuts=st.lists(st.integers(0, 200), max_size=40))
@example(raw=b"aab", stop_strings=("ab", "aab"), cuts=[0, 1, 2])
@example(raw="中😀".encode(), stop_strings=("😀",), cuts=[1, 2, 3, 4, 5, 6])
@example(raw=b"a\xe4\xb8", stop_strings=("a\ufffd",), cuts=[1, 2])
@example(raw=b"abab", stop_strings=("ba", "abab"), cuts=[1, 2, 3])
def test_any_pieces_give_the_text_of_the_reference(
    raw: bytes, stop_strings: tuple[str, ...], cuts: list[int]
) -> None:
    detokenizer = Detokenizer(stop_strings)
    longest = max(map(len, stop_strings), default=1)
    shown = ""
    for piece in pieces(raw, cuts):
        shown += detokenizer.feed(piece)
        assert detokenizer.text.startswith(shown)
        assert len(detokenizer.text) - len(shown) <= longest - 1
    shown += detokenizer.flush()
    assert (shown, detokenizer.stop) == reference(raw, stop_strings)
    assert detokenizer.text == shown


@settings(max_examples=200, deadline=None)
@given(raw=data, stop_strings=stops, more=data)
def test_what_is_shown_is_never_taken_back(raw: bytes, stop_strings: tuple[str, ...], more: bytes) -> None:
    # Whatever follows, what was shown begins the final text.
    detokenizer = Detokenizer(stop_strings)
    shown = detokenizer.feed(raw)
    final, _ = reference(raw + more, stop_strings)
    assert final.startswith(shown)


@settings(max_examples=200, deadline=None)
@given(raw=data, cuts=st.lists(st.integers(0, 200), max_size=10))
def test_without_stops_nothing_whole_is_held_back(raw: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer()
    shown = "".join(detokenizer.feed(piece) for piece in pieces(raw, cuts))
    assert shown == detokenizer.text
    assert shown + detokenizer.flush() == raw.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["é", "中", "😀"])
def test_mid_character(text: str) -> None:
    detokenizer = Detokenizer()
    raw = text.encode()
    for byte in raw[:-1]:
        assert detokenizer.feed(bytes([byte])) == ""
        assert detokenizer.mid_character
    assert detokenizer.feed(raw[-1:]) == text
    assert not detokenizer.mid_character


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(("b",))
    assert detokenizer.feed(b"ab") == "a"
    assert detokenizer.feed(b"more") == ""
    assert detokenizer.flush() == ""
    assert (detokenizer.text, detokenizer.stop) == ("a", "b")


def shown_by_reference(chunks: list[tuple[bytes, bool]], stop_strings: tuple[str, ...], include: bool) -> str:
    """The whole text; stop strings count where they begin in text that came armed."""
    whole = b"".join(piece for piece, _ in chunks).decode("utf-8", "replace")
    early = b"".join(piece for piece, armed in chunks if not armed)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    begin = len(decoder.decode(early))
    text, stop = reference(whole[begin:].encode("utf-8", "surrogatepass"), stop_strings)
    return whole[:begin] + text + (stop or "" if include else "")


@settings(max_examples=300, deadline=None)
@given(
    raw=texts.map(str.encode),
    stop_strings=stops,
    cuts=st.lists(st.integers(0, 200), max_size=30),
    num_early=st.integers(0, 10),
    include=st.booleans(),
)
@example(raw=b"abab", stop_strings=("ab",), cuts=[1, 2, 3], num_early=2, include=True)
@example(raw=b"aabab", stop_strings=("aab", "ab"), cuts=[1, 2, 3], num_early=1, include=False)
def test_stops_that_begin_early_do_not_count_and_hold_nothing_back(
    raw: bytes, stop_strings: tuple[str, ...], cuts: list[int], num_early: int, include: bool
) -> None:
    chunks = [(piece, i >= num_early) for i, piece in enumerate(pieces(raw, cuts))]
    detokenizer = Detokenizer(stop_strings, include_stop=include)
    shown = ""
    for piece, armed in chunks:
        shown += detokenizer.feed(piece, armed=armed)
        if not armed:
            assert shown == detokenizer.text
            assert detokenizer.stop is None
    shown += detokenizer.flush()
    assert shown == detokenizer.text == shown_by_reference(chunks, stop_strings, include)


def test_the_stop_string_is_shown_where_it_is_asked_for() -> None:
    detokenizer = Detokenizer(("bc", "c"), include_stop=True)
    assert detokenizer.feed(b"ab") == "a"
    assert detokenizer.feed(b"cd") == "bc"
    assert (detokenizer.text, detokenizer.stop, detokenizer.flush()) == ("abc", "bc", "")


def held_by_reference(text: str, stop_strings: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string, tried one by one."""
    lengths = range(min(max(map(len, stop_strings), default=1) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stop_strings)), 0)


# Stop strings that are nearly complete again and again, and that begin and end in one another.
repeating = st.tuples(
    st.sampled_from(["a", "ab", "aab"]), st.integers(1, 12), st.sampled_from(["", "b", "c", "aa"])
).map(lambda parts: parts[0] * parts[1] + parts[2])


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", "a" * 7, "b", "ab" * 4, "aab", "c"]), max_size=30).map("".join),
    stop_strings=st.lists(repeating, max_size=16).map(tuple),
    cuts=st.lists(st.integers(0, 200), max_size=40),
    num_early=st.integers(0, 3),
)
@example(text="a" * 12 + "b", stop_strings=tuple("a" * n + "b" for n in range(5, 13)), cuts=[], num_early=0)
@example(text="aabaabaac", stop_strings=("aabaac", "abaab" * 2), cuts=[1, 2, 3, 4, 5, 6, 7, 8], num_early=0)
def test_as_much_is_held_back_as_could_become_a_stop(
    text: str, stop_strings: tuple[str, ...], cuts: list[int], num_early: int
) -> None:
    detokenizer = Detokenizer(stop_strings)
    shown, early = "", 0
    for index, piece in enumerate(pieces(text.encode(), cuts)):
        armed = index >= num_early
        shown += detokenizer.feed(piece, armed=armed)
        early = early if armed else len(detokenizer.text)
        if detokenizer.stop is None:
            held = held_by_reference(detokenizer.text[early:], stop_strings)
            assert shown == detokenizer.text[: len(detokenizer.text) - held]
    rest, stop = reference(text[early:].encode(), stop_strings)
    assert (detokenizer.stop, shown + detokenizer.flush()) == (stop, text[:early] + rest)


def test_thousands_of_stop_strings_that_fall_back_on_each_other() -> None:
    stop_strings = tuple("a" * length + "b" for length in range(1500, 3000))
    detokenizer = Detokenizer(stop_strings)
    shown = detokenizer.feed(b"a" * 4000 + b"b")
    assert (shown, detokenizer.stop) == ("a" * 1001, "a" * 2999 + "b")

"""Respelling grown text: always the tokens of the whole text, with a simulated cache that stays a true prefix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import byte_level, metaspace, replacing

from ensemble_core.config import Config
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.text.alignment import Track, last_stable_boundary
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer

SIZE = 480
TOKENIZERS = {
    "byte-level": byte_level(SIZE, "<eos>"),
    "metaspace": metaspace(SIZE),
    "replace": replacing(SIZE),
    "replace-prepend": replacing(SIZE, prepend=True),
}
VOCABULARIES = {name: from_tokenizer(tok, SIZE, [tok.eos_token_id], name) for name, tok in TOKENIZERS.items()}

SCRAPS = [
    *("the", " the", "ing", "fox", "a", "B", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "'s", "."),
    *(", ", "!?", "42", " 7", "1000", "x1", "é", "e\u0301", "\u0301", "ß", "Привет", " мир", "你好", "。"),
    *("世界 ", "日", "😀", "🏳️‍🌈", "\u200b", "\u3000", "½", "_", "<eos>", "</s>", "def f(x):\n\t", "\ufffd"),
]
growths = st.lists(st.sampled_from(SCRAPS) | st.text(max_size=3), max_size=25)


def grow(vocabulary: Vocabulary, pieces: list[str], feeds: Callable[[int], int]) -> None:
    """Respell after each piece, feed a simulated member, and check what must hold."""
    track = Track(vocabulary, [1, 2, 3], num_cached=3)
    cached, text = [1, 2, 3], ""
    for step, piece in enumerate(pieces):
        text += piece
        dropped = track.respell(text)
        assert track.completion_ids == vocabulary.encode(text)
        assert track.num_uncached >= 1
        assert track.num_cached == len(cached) - dropped >= 2  # of the prompt, only the last is ever fed again
        del cached[track.num_cached :]
        assert cached == (track.prompt_ids + track.completion_ids)[: track.num_cached]
        fed = track.uncached(feeds(step))
        cached += fed
        track.num_cached += len(fed)
    assert cached == (track.prompt_ids + track.completion_ids)[: track.num_cached]


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(max_examples=120, deadline=None)
@given(pieces=growths, slow=st.booleans())
@example(pieces=["word", " ", " ", "word", "\n", "\n"], slow=False)
@example(pieces=["e", "\u0301", " e", "\u0301 x"], slow=True)
def test_grown_text_is_spelt_as_the_whole(kind: str, pieces: list[str], slow: bool) -> None:
    # A slow member lags behind: it is not fed all that is there before the text goes on.
    if kind != "byte-level":
        pieces = [piece.replace("▁", "_") for piece in pieces]
    grow(VOCABULARIES[kind], pieces, (lambda step: step % 3) if slow else (lambda _: 10**6))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_grown_text_is_spelt_as_the_whole_by_the_demo_pair(demo_config: Config, name: str) -> None:
    vocabulary = load_vocabulary(name, demo_config.members[name])

    @settings(max_examples=500, deadline=None)
    @given(pieces=growths, slow=st.booleans())
    def check(pieces: list[str], slow: bool) -> None:
        pieces = [piece.replace("▁", "_") for piece in pieces]
        grow(vocabulary, pieces, (lambda step: step % 3) if slow else (lambda _: 10**6))

    check()


def bridging() -> Vocabulary:
    """A vocabulary with a token that runs over a space: `o wo`."""
    tokens = [b"a", b"b", b"h", b"l", b"o", b"w", b"r", b"d", b" ", b"o wo", b"<eos>"]
    by_length = sorted(range(len(tokens) - 1), key=lambda i: -len(tokens[i]))

    def encode(text: str) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            token_id = next(i for i in by_length if rest.startswith(tokens[i]))
            ids.append(token_id)
            rest = rest[len(tokens[token_id]) :]
        return ids

    return Vocabulary(tokens, frozenset({10}), frozenset({10}), encode)


def test_no_boundary_where_a_token_runs_over_the_space() -> None:
    vocabulary = bridging()
    assert vocabulary.bridged == {"o"}
    assert last_stable_boundary("hallo wo", 0, vocabulary.bridged) == 0
    assert last_stable_boundary("ball wo", 0, vocabulary.bridged) == 4
    grow(vocabulary, ["hallo", " ", "wo", "rld ", "hallo w", "o", " b"], lambda _: 10**6)


@pytest.mark.parametrize(
    ("text", "start", "boundary"),
    [
        ("", 0, 0),
        ("word", 0, 0),
        (" word", 0, 0),
        ("word ", 0, 4),
        ("one two  three", 0, 7),
        ("one two. three", 0, 3),
        ("one two", 3, 3),
        ("中文 x", 0, 2),
        ("e\u0301 x", 0, 0),
        ("a\tb\nc", 0, 0),
    ],
)
def test_the_last_stable_boundary(text: str, start: int, boundary: int) -> None:
    assert last_stable_boundary(text, start, frozenset()) == boundary


def test_long_text_is_not_spelt_from_its_beginning() -> None:
    whole = VOCABULARIES["byte-level"]
    longest = 0

    def encode(text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return whole.encode(text)

    track = Track(Vocabulary(whole.tokens, whole.special_ids, whole.stop_ids, encode), [1])
    text = ""
    for _ in range(200):
        text += " word"
        track.respell(text)
    assert longest <= 2 * len(" word")


def test_uncached_crosses_from_the_prompt_into_the_completion() -> None:
    track = Track(VOCABULARIES["byte-level"], [1, 2, 3], completion_ids=[4, 5])
    assert (len(track), track.num_uncached) == (5, 5)
    assert track.uncached(4) == [1, 2, 3, 4]
    track.num_cached = 3
    assert track.uncached(1) == [4]
    track.num_cached = 4
    assert track.uncached(9) == [5]

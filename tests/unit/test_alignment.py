"""Respelling text that grows and changes: always the tokens of the whole, a true prefix cached, at a flat cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling_cases import ALIKE, UNCOVERED, chained, every_kind, random_merges

from ensemble_core.config import Config
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.text.alignment import Track
from ensemble_core.text.vocabulary import Vocabulary

VOCABULARIES = every_kind()
BYTES = ("byte-level", "across-spaces", "names")  # kinds that tell a space from its mark
PROMPT = [1, 2, 3]

SCRAPS = [
    *("the", " the", "ing", "fox", "a", "B", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "'s", "'", "."),
    *(", ", "!?", "42", " 7", "1000", "x1", "é", "e\u0301", "\u0301", "ß", "Привет", " мир", "你好", "。"),
    *("世界 ", "日", "😀", "🏳️‍🌈", "\u200b", "\u3000", "½", "_", "<eos>", "</s>", "def f(x):\n\t", "\ufffd"),
    *(
        "aaaa",
        "====",
        "hahaha",
        "ABC",
        "你AB",
        "l",
        "ll",
        "=",
        "/",
        "//",
        '{"a":1,',
        "<td>",
        "<|x\n|>",
        "<tr>",
        "> x",
    ),
    *(ALIKE[0], f" {ALIKE[1]}", f"{ALIKE[2]} {ALIKE[3]}", "가", "\u11a8", "ª", "你好 你好"),
]
pieces = st.sampled_from(SCRAPS) | st.text(max_size=3)
# Each change keeps a share of the text (all, all but a little, or a part) and writes some more.
kept_shares = st.sampled_from([1.0, 1.0, 1.0, 0.95, 0.8, 0.3, 0.0])
changes = st.lists(st.tuples(kept_shares, pieces), max_size=25)


def texts_of(steps: list[tuple[float, str]]) -> list[str]:
    return list(accumulate(steps, lambda text, step: text[: int(step[0] * len(text))] + step[1], initial=""))[1:]


def plain(kind: str, text: str) -> str:
    return text if kind in BYTES else text.replace("▁", "_")


def follow(vocabulary: Vocabulary, texts: list[str], feeds: Callable[[int], int]) -> None:
    """Respell each text, feed a simulated member, and check what must hold."""
    track = Track(vocabulary, list(PROMPT), num_cached=3)
    cached = list(PROMPT)
    for step, text in enumerate(texts):
        before = list(track.completion_ids)
        dropped = track.respell(text)
        assert track.completion_ids == vocabulary.encode(text)
        assert track.num_uncached >= 1
        assert track.num_cached == len(cached) - dropped >= 2  # of the prompt, only the last is ever fed again
        same = next(
            (i for i, (a, b) in enumerate(zip(before, track.completion_ids, strict=False)) if a != b), 10**6
        )
        same = min(same, len(before), len(track.completion_ids))
        assert track.num_cached == min(len(cached), 3 + same, len(track) - 1)  # and no more than must be
        del cached[track.num_cached :]
        assert cached == (track.prompt_ids + track.completion_ids)[: track.num_cached]
        fed = track.uncached(feeds(step))
        cached += fed
        track.num_cached += len(fed)
    assert cached == (track.prompt_ids + track.completion_ids)[: track.num_cached]


def at_once(_: int) -> int:
    return 10**6


def late(step: int) -> int:
    """A slow member: it is not fed all that is there before the text goes on."""
    return step % 3


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(max_examples=60, deadline=None)
@given(growth=st.lists(pieces, max_size=25), slow=st.booleans())
@example(growth=["word", " ", " ", "word", "\n", "\n"], slow=False)
@example(growth=["e", "\u0301", " e", "\u0301 x"], slow=True)
@example(growth=["\n"] * 12 + ["x"], slow=False)
@example(growth=["it", "'", "l", "l", "l", " ", "'", "ll", "x"], slow=False)
@example(growth=["가", "\u11a8", " e", "\u0301", "a", "\u0301"], slow=False)
@example(growth=["<", "|", "x", "\n", "|", ">", "a", "<", "t", "d", ">", " ", "x"], slow=False)
def test_grown_text_is_spelt_as_the_whole(kind: str, growth: list[str], slow: bool) -> None:
    texts = [plain(kind, text) for text in accumulate(growth)]
    follow(VOCABULARIES[kind], texts, late if slow else at_once)


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(max_examples=60, deadline=None)
@given(steps=changes, slow=st.booleans())
@example(steps=[(1.0, "the fox"), (0.0, ""), (1.0, "the fox")], slow=False)
@example(steps=[(1.0, "\n" * 20), (0.5, "x"), (0.95, "\n\n")], slow=False)
def test_changed_text_is_spelt_as_the_whole(kind: str, steps: list[tuple[float, str]], slow: bool) -> None:
    texts = [plain(kind, text) for text in texts_of(steps)]
    follow(VOCABULARIES[kind], texts, late if slow else at_once)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    use_regex=st.booleans(),
    steps=st.lists(st.tuples(kept_shares, st.text("aaabbc \n你好", max_size=5)), max_size=25),
)
def test_no_order_of_merges_breaks_it(seed: int, use_regex: bool, steps: list[tuple[float, str]]) -> None:
    follow(random_merges(seed, use_regex), texts_of(steps), at_once)


def test_a_letter_that_moves_every_token_before_it() -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    vocabulary = chained(letters)
    assert vocabulary.encode(letters[:-1])[-20:] != vocabulary.encode(letters)[-21:-1]
    follow(vocabulary, [letters[:length] for length in (*range(len(letters)), 40, 41, 60, 30)], at_once)


@pytest.mark.parametrize(
    "kind", ["across-spaces", "unpatterned", "unpatterned-names", "normalized-names", "gpt4o"]
)
@pytest.mark.parametrize(
    "unit", ["> x", "a", "ab", "aab", " ", "\n", "=", "你", "你好", "ha", "<td>", "a<t", "7", "'"]
)
def test_repetition_is_spelt_as_the_whole(kind: str, unit: str) -> None:
    text = unit * 60
    follow(VOCABULARIES[kind], [text[:length] for length in (*range(60), *range(60, 30, -7), 60)], at_once)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_any_text_is_spelt_as_the_whole_by_the_demo_pair(demo_config: Config, name: str) -> None:
    vocabulary = load_vocabulary(name, demo_config.members[name])

    @settings(max_examples=500, deadline=None)
    @given(steps=changes, slow=st.booleans())
    def check(steps: list[tuple[float, str]], slow: bool) -> None:
        texts = [text.replace("▁", "_") for text in texts_of(steps)]
        follow(vocabulary, texts, late if slow else at_once)

    check()


LONG = {
    "words": "the quick brown fox, " * 100,
    "chinese": "你好世界今天天气很好東京は日本の首都です" * 80,
    "json": '{"name":"fox","tags":["a","b"],"n":42},' * 40,
    "a": "a" * 1500,
    "spaces": " " * 1500,
    "newlines": "\n" * 1500,
    "signs": "=" * 1500,
    "ha": "哈" * 1500,
}
BOUND = 100  # characters spelt at once, of 1,500


def longest_spelt(vocabulary: Vocabulary, text: str, first: int) -> int:
    """The longest piece spelt while the text grows by a character at a time from `first` on."""
    lengths: list[int] = []

    def encode(piece: str) -> list[int]:
        lengths.append(len(piece))
        return vocabulary.encode(piece)

    track = Track(replace(vocabulary, encode=encode), [1])
    for length in range(first, len(text) + 1):
        if length == first + 1:
            lengths.clear()
        track.respell(text[:length])
    return max(lengths)


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "across-spaces", "unpatterned-lines"])
def test_the_cost_does_not_grow_with_the_text(kind: str, text: str) -> None:
    assert longest_spelt(VOCABULARIES[kind], LONG[text], len(LONG[text]) - 40) <= BOUND


@pytest.mark.parametrize("kind", sorted(VOCABULARIES.keys() - UNCOVERED))
def test_words_cost_as_little_in_every_kind(kind: str) -> None:
    assert longest_spelt(VOCABULARIES[kind], LONG["words"], 1500) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@pytest.mark.parametrize("text", LONG)
def test_the_cost_does_not_grow_for_the_demo_pair(demo_config: Config, name: str, text: str) -> None:
    vocabulary = load_vocabulary(name, demo_config.members[name])
    longest_token = max(map(len, vocabulary.tokens))  # a run of spaces or signs
    assert longest_spelt(vocabulary, LONG[text], len(LONG[text]) - 40) <= 6 * longest_token


def test_long_text_is_not_spelt_from_its_beginning() -> None:
    whole = VOCABULARIES["byte-level"]
    longest = 0

    def encode(text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return whole.encode(text)

    track = Track(replace(whole, encode=encode), [1])
    text = ""
    for _ in range(200):
        text += " word"
        track.respell(text)
    assert longest <= 2 * len(" word")


def bridging() -> Vocabulary:
    """A vocabulary with a token that runs over a space, `o wo`, of which nothing else is known."""
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


def test_a_vocabulary_that_proves_nothing_is_spelt_as_a_whole() -> None:
    texts = list(accumulate(["hallo", " ", "wo", "rld ", "hallo w", "o", " b"]))
    follow(bridging(), [*texts, texts[1], texts[3]], at_once)


def test_uncached_crosses_from_the_prompt_into_the_completion() -> None:
    track = Track(VOCABULARIES["byte-level"], [1, 2, 3], completion_ids=[4, 5])
    assert (len(track), track.num_uncached) == (5, 5)
    assert track.uncached(4) == [1, 2, 3, 4]
    track.num_cached = 3
    assert track.uncached(1) == [4]
    track.num_cached = 4
    assert track.uncached(9) == [5]


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 9)), max_size=20))
def test_tokens_that_are_taken_back_leave_what_was_before_them(steps: list[tuple[int, int, int]]) -> None:
    track = Track(VOCABULARIES["byte-level"], list(PROMPT), num_cached=3)
    cached, truth = list(PROMPT), list(PROMPT)
    for new, back, fed in steps:
        for token_id in range(10, 10 + new):
            track.append(token_id)
            truth.append(token_id)
        ids = track.uncached(fed)
        cached += ids
        track.num_cached += len(ids)
        count = min(back, len(track.completion_ids))
        dropped = track.take_back(count)
        del truth[len(truth) - count :]
        assert track.prompt_ids + track.completion_ids == truth
        assert track.num_cached == len(cached) - dropped == min(len(cached), len(truth) - 1)
        del cached[track.num_cached :]
        assert cached == truth[: len(cached)]


def test_a_track_that_was_appended_to_can_still_be_respelt() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    track = Track(vocabulary, list(PROMPT))
    track.respell("the fox")
    track.append(vocabulary.ids_by_bytes[b"a"])
    track.respell("the foxa b")
    assert track.completion_ids == vocabulary.encode("the foxa b")
    track.take_back(2)
    track.respell("the foxa b")
    assert track.completion_ids == vocabulary.encode("the foxa b")


@pytest.mark.parametrize("count", [-1, 3])
def test_no_more_is_taken_back_than_there_is(count: int) -> None:
    with pytest.raises(AssertionError, match="taken back"):
        Track(VOCABULARIES["byte-level"], [1], completion_ids=[4, 5]).take_back(count)

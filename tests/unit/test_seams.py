"""Seams against the tokenizers themselves: splits on either side are those of either side alone."""

from __future__ import annotations

import json
import unicodedata
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling_cases import PATTERNS, QWEN, SIZE, UNCOVERED, every_kind
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from ensemble_core.text.seams import Seam, Seams, find_seams

PRE_TOKENIZERS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="never"),
    "with-next": pre_tokenizers.Split("▁", "merged_with_next"),
    "with-previous": pre_tokenizers.Split(" ", "merged_with_previous"),
    "isolated": pre_tokenizers.Split(",", "isolated"),
    "digits": pre_tokenizers.Digits(individual_digits=True),
    "numbers": pre_tokenizers.Digits(individual_digits=False),
    "punctuation": pre_tokenizers.Punctuation(),
    "digits-gpt2": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "punctuation-qwen": pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Split(Regex(QWEN), "removed", invert=True)]
    ),
}
PRE_TOKENIZERS |= {name: pre_tokenizers.Split(Regex(pattern), "isolated") for name, pattern in PATTERNS.items()}

# Every class of characters that a pattern tells apart, and what it treats in its own way.
ALPHABET = "aabBslLrtvemdD''’ 12½Ⅷ٣,.=/-$\n\r\t你好가éßǅʰªΣſK\u0301\u093e\u200d\xa0\u3000\x00\x1c\x85▁😀\u0378"
texts = st.text(ALPHABET, min_size=2, max_size=14) | st.sets(
    st.sampled_from(ALPHABET), min_size=1, max_size=4
).flatmap(lambda few: st.text(st.sampled_from(sorted(few)), min_size=2, max_size=14))


def seams_of(pre_tokenizer: Any) -> Seams | None:
    section = json.loads(pre_tokenizer.__getstate__())
    parts = section["pretokenizers"] if section["type"] == "Sequence" else [section]
    return find_seams(models.BPE(), {}, [], parts)


def splits(pre_tokenizer: Any, text: str) -> set[int]:
    return {start for _, (start, _) in pre_tokenizer.pre_tokenize_str(text)} - {0}


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=texts)
@example(text="mªªΣlmm")
@example(text="it'lll'l")
@example(text="=a ==b /=/\n/=")
@example(text="\n   \n  x")
def test_each_side_of_a_seam_splits_as_it_does_alone(kind: str, text: str) -> None:
    pre_tokenizer = PRE_TOKENIZERS[kind]
    seams = seams_of(pre_tokenizer)
    assert seams is not None
    whole = splits(pre_tokenizer, text)
    for place in range(1, len(text)):
        if (seam := seams.at(text, place)) is not Seam.NONE:
            alone = splits(pre_tokenizer, text[:place]) | {place + s for s in splits(pre_tokenizer, text[place:])}
            assert whole - {place} == alone
            assert place in whole or seam is Seam.JOINED


@pytest.mark.parametrize("kind", ["gpt2", "digits-gpt2", *PATTERNS])
@settings(max_examples=200, deadline=None)
@given(left=texts, right=texts, text=texts)
@example(left="=\n", right="", text="/==")
def test_what_lies_far_away_does_not_decide_a_split_at_a_seam(kind: str, left: str, right: str, text: str) -> None:
    pre_tokenizer = PRE_TOKENIZERS[kind]
    seams = seams_of(pre_tokenizer)
    assert seams is not None
    place = len(text) // 2
    longer, moved = left + text + right, len(left) + place
    if Seam.NONE not in (seams.at(text, place), seams.at(longer, moved)):
        assert (place in splits(pre_tokenizer, text)) == (moved in splits(pre_tokenizer, longer))


VOCABULARIES = every_kind()


@pytest.mark.parametrize("kind", sorted(VOCABULARIES.keys() - UNCOVERED))
@settings(max_examples=50, deadline=None)
@given(
    text=texts
    | st.lists(st.sampled_from(["a<td>", "\n", "\n\n", "<|x\n|>", "<tr>", "> x", "你好", " "])).map("".join)
)
def test_both_sides_of_a_split_are_spelt_alone(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert vocabulary.seams is not None
    for place in range(len(text) + 1):
        if vocabulary.seams.at(text, place) is Seam.SPLIT:
            assert vocabulary.encode(text) == vocabulary.encode(text[:place]) + vocabulary.encode(text[place:])


NAMES = ["a<td>", "<tr>", "<td>", "\n", "\n\n\n", "<|x\n|", ">", "> x", "x", "你好", "你好\n", " ", "<eos>"]


@pytest.mark.parametrize("kind", ["names", "across-spaces-names", "unpatterned-names", "normalized-names"])
@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(NAMES), max_size=8).map("".join))
@example(text="<|x\n|> x")
@example(text="<tr><td>a<td> x")
def test_added_tokens_on_each_side_of_a_seam_are_those_that_are_found_alone(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert vocabulary.seams is not None

    def found(piece: str, start: int = 0) -> list[tuple[int, int]]:
        ids = vocabulary.encode(piece)
        ends = accumulate((len(vocabulary.tokens[i]) for i in ids), initial=start)
        return [(i, end) for i, end in zip(ids, ends, strict=False) if i >= SIZE]

    for place in range(1, len(text)):
        if vocabulary.seams.at(text, place) is not Seam.NONE:
            left, right = text[:place], text[place:]
            assert found(text) == found(left) + found(right, len(left.encode()))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ae가각ᄀ\u1161\u11a8\u0301\u0327\u093c\u3099かé字\u0958 ", min_size=2, max_size=8)
    | st.text(max_size=6)
)
def test_nothing_composes_over_a_seam(text: str) -> None:
    seams = find_seams(models.BPE(), {}, [{"type": "NFC"}], [])
    assert seams is not None
    nfc = partial(unicodedata.normalize, "NFC")
    for place in range(1, len(text)):
        if seams.at(text, place) is not Seam.NONE:
            assert nfc(text) == nfc(text[:place]) + nfc(text[place:])


def test_an_added_token_within_a_control_token_settles_nothing() -> None:
    names = {5: AddedToken("ing"), 6: AddedToken("\n\n"), 7: AddedToken("<|ing|>", special=True)}
    seams = find_seams(models.BPE(), names, [], [])
    assert seams is not None
    longest = len("<|ing|>")
    assert [seams.settled(token_id, 2 * longest) for token_id in (4, 5, 6, 7)] == [False, False, True, False]
    assert not seams.settled(6, 2 * longest - 1)


def byte_level(use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "use_regex": use_regex}


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
QWEN_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("normalizers", "pre", "added"),
    [
        ([{"type": "NFKC"}], [byte_level()], {}),
        ([SPACES | {"content": "_"}], [], {}),
        ([SPACES], [byte_level()], {}),
        ([], [byte_level(), QWEN_SPLIT], {}),
        ([], [QWEN_SPLIT, byte_level()], {}),
        ([], [QWEN_SPLIT | {"behavior": "Contiguous"}], {}),
        ([], [QWEN_SPLIT | {"pattern": {"Regex": QWEN + "|x y"}}], {}),
        ([], [{"type": "UnicodeScripts"}], {}),
        ([], [], {5: AddedToken("<x>", lstrip=True)}),
        ([], [], {5: AddedToken("<x>", rstrip=True)}),
        ([], [], {5: AddedToken("<x>", single_word=True)}),
        ([{"type": "NFC"}], [], {5: AddedToken("<x>", normalized=True)}),
    ],
)
def test_what_is_not_proved_is_not_covered(
    normalizers: list[dict[str, Any]], pre: list[dict[str, Any]], added: dict[int, AddedToken]
) -> None:
    assert find_seams(models.BPE(), added, normalizers, pre) is None


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(ignore_merges=True),
        models.BPE(dropout=0.1),
        models.BPE(end_of_word_suffix="</w>"),
        models.BPE(continuing_subword_prefix="##"),
        models.Unigram(),
        models.WordPiece(),
    ],
)
def test_other_models_are_cut_only_where_the_text_is_split(model: Any) -> None:
    seams = find_seams(model, {}, [], [byte_level()])
    assert seams is not None
    assert [seams.at("ab cd", place) for place in range(6)] == [2, 0, 2, 0, 0, 2]


def test_both_ends_are_seams() -> None:
    seams = find_seams(models.BPE(), {}, [], [])
    assert seams is not None
    assert [seams.at("ab", place) for place in range(3)] == [Seam.SPLIT, Seam.JOINED, Seam.SPLIT]

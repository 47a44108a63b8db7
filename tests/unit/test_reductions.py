"""The common vocabulary of two trained BPE tokenizers: closed under both's merges, and as large as that allows."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from fakes import byte_vocabulary
from tiny_models import CORPUS, byte_level, replacing
from transformers import PreTrainedTokenizerFast

from ensemble_core.errors import EvaluationError
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer
from studies.reductions import Merges, Reduction, common_vocabulary, merges_of, to_bytes, to_common

Pair = tuple[list[Vocabulary], list[Merges]]


def member(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[Vocabulary, Merges]:
    vocabulary = from_tokenizer(tokenizer, size, [], "tiny")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return vocabulary, merges_of(model, vocabulary, "tiny")


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A byte-level tokenizer, and one of characters with byte fallback whose tokens may run over spaces."""
    made: list[tuple[Callable[[int], PreTrainedTokenizerFast], int]] = [
        (lambda size: byte_level(size, "<end>"), 520),
        (lambda size: replacing(size, across=True), 640),
    ]
    members = [member(make(size), size) for make, size in made]
    return [vocabulary for vocabulary, _ in members], [merges for _, merges in members]


def shared_of(vocabularies: list[Vocabulary]) -> set[bytes]:
    return set.intersection(*(set(vocabulary.ids_by_bytes) for vocabulary in vocabularies))


def test_merges_spell_words_as_the_tokenizer_does(pair: Pair) -> None:
    """Pieces of the corpus that no pre-tokenizer splits."""
    words = {word for line in CORPUS for word in line.split() if word.isalpha()}
    assert len(words) > 100
    for vocabulary, merges in zip(*pair, strict=True):
        for word in words:
            written = [vocabulary.tokens[token_id] for token_id in vocabulary.encode(word)]
            parts, _ = merges.spell("".join(merges_alphabet(merges, word)))
            assert [merges.bytes_of[part] for part in parts] == written


def merges_alphabet(merges: Merges, word: str) -> list[str]:
    """A word as the tokenizer's own characters: letters where it has them, else its pieces of single bytes."""
    by_bytes = {spelt: piece for piece, spelt in merges.bytes_of.items() if len(piece) == 1}
    if all(char.encode() in by_bytes for char in word):
        return [by_bytes[char.encode()] for char in word]
    if all(bytes([byte]) in by_bytes for byte in word.encode()):
        return [by_bytes[bytes([byte])] for byte in word.encode()]
    return list(word)


def test_common_strings_are_tokens_of_all_made_within(pair: Pair) -> None:
    vocabularies, merges = pair
    common = common_vocabulary(vocabularies, merges)
    kept = set(common)
    assert kept <= shared_of(vocabularies)
    assert len(kept) > 300
    for vocabulary, own in zip(vocabularies, merges, strict=True):
        for spelt in common:
            if len(spelt) == 1:
                continue
            piece = own.pieces[vocabulary.ids_by_bytes[spelt]]
            parts, made = own.spell(piece, kept)
            assert parts == [piece], "merges within the set must lead to every string of it"
            assert {own.bytes_of[each] for each in made} <= kept


def test_the_common_vocabulary_is_the_largest(pair: Pair) -> None:
    """What was left out needs something that is not shared: some chain of needs leads out of the intersection."""
    vocabularies, merges = pair
    shared = shared_of(vocabularies)
    kept = set(common_vocabulary(vocabularies, merges))
    lost = {spelt for spelt in shared - kept if len(spelt) > 1}
    assert lost, "a test of nothing: everything shared is closed"
    blamed: set[bytes] = set()
    while True:
        more = set()
        for spelt in lost - blamed:
            needs = [m.ancestry(v.ids_by_bytes[spelt]) for v, m in zip(vocabularies, merges, strict=True)]
            if any(need is None or need - shared or need & blamed for need in needs):
                more.add(spelt)
        if not more:
            break
        blamed |= more
    assert blamed == lost


def test_nested_spellings_join_to_the_token(pair: Pair) -> None:
    vocabularies, merges = pair
    common = common_vocabulary(vocabularies, merges)
    for vocabulary, own in zip(vocabularies, merges, strict=True):
        reduction = to_common(vocabulary, own, common)
        spelt = [b"".join(common[symbol] for symbol in symbols) for symbols in reduction.sequences]
        written = [i for i in range(len(vocabulary)) if vocabulary.text_bytes(i)]
        assert all(spelt[i] in (vocabulary.text_bytes(i), b"") for i in written)
        reduced = [i for i in written if len(reduction.sequences[i]) > 1]
        assert reduced, "a test of nothing: no token is outside the common vocabulary"


def test_equal_tokenizers_have_everything_in_common(pair: Pair) -> None:
    vocabulary, merges = pair[0][0], pair[1][0]
    common = common_vocabulary([vocabulary, vocabulary], [merges, merges])
    assert set(common) == set(vocabulary.ids_by_bytes)
    reduction = to_common(vocabulary, merges, common)
    assert {len(symbols) for symbols in reduction.sequences} == {0, 1}


def test_masses_along_a_path_are_those_of_tokens_that_begin_so() -> None:
    vocabulary = byte_vocabulary(["ab", "abc", "abd", "b", "bc"])  # b twice
    reduction = to_bytes(vocabulary)
    logprobs = torch.randn(len(vocabulary), generator=torch.Generator().manual_seed(0)).log_softmax(0)
    begun, just = reduction.along(logprobs, tuple(b"abcx"))
    p = logprobs.double().exp()
    for end, (beginning, whole) in enumerate(zip(begun, just, strict=True), start=1):
        tokens = [(i, vocabulary.text_bytes(i)) for i in range(len(vocabulary))]
        assert beginning == pytest.approx(sum(float(p[i]) for i, t in tokens if t[:end] == b"abcx"[:end]))
        assert whole == pytest.approx(sum(float(p[i]) for i, t in tokens if t == b"abcx"[:end]))
    assert len(begun) == 3, "no token begins with abcx"


def test_a_byte_at_the_end_of_the_alphabet_has_a_range() -> None:
    reduction = Reduction([(255,), (255, 255), (255, 255, 1), (254,)])
    assert reduction.order[reduction.beginning((255, 255))].tolist() == [1, 2]
    assert reduction.order[reduction.spelling((255,))].tolist() == [0]


def test_tokenizers_without_merges_are_refused() -> None:
    with pytest.raises(EvaluationError, match="a Unigram model has no merges"):
        merges_of({"type": "Unigram", "vocab": []}, byte_vocabulary(), "tokenizer.json")

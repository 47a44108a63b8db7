"""Vocabularies of every supported kind: bytes join to the text, specials stay out of it, bad ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_level, metaspace, replacing
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ensemble_core.errors import UnsupportedModelError
from ensemble_core.text.vocabulary import PROOF_SAMPLES, Vocabulary, from_tokenizer, prove

SIZE = 420
TOKENIZERS = {
    "byte-level": byte_level(SIZE, "<eos>", ("<|im_end|>",)),
    "metaspace-first": metaspace(SIZE, "first"),
    "metaspace-always": metaspace(SIZE, "always"),
    "metaspace-never": metaspace(SIZE, "never"),
    "replace": replacing(SIZE),
    "replace-prepend": replacing(SIZE, prepend=True),
}
VOCABULARIES = {name: from_tokenizer(tok, SIZE, [tok.eos_token_id], name) for name, tok in TOKENIZERS.items()}

every_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def join(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(vocabulary.tokens[i] for i in ids)


@every_kind
@pytest.mark.parametrize("sample", PROOF_SAMPLES)
def test_joined_bytes_are_the_text(kind: str, sample: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert join(vocabulary, vocabulary.encode(sample)) == sample.encode()


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_joined_bytes_are_any_text(kind: str, text: str) -> None:
    if "▁" in text and kind != "byte-level":
        return  # SentencePiece cannot tell its own space mark from a space
    vocabulary = VOCABULARIES[kind]
    assert join(vocabulary, vocabulary.encode(text)) == text.encode()


@every_kind
@pytest.mark.parametrize("text", ["word", " word", "  word", "\n", "", "1"])
def test_a_continuation_gets_no_dummy_prefix(kind: str, text: str) -> None:
    vocabulary = VOCABULARIES[kind]
    assert join(vocabulary, vocabulary.encode(text)) == text.encode()


@every_kind
def test_tokens_match_the_tokenizers_own_ids(kind: str) -> None:
    # After a shared beginning the tokenizer itself must write what `encode` writes.
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    whole = tokenizer("x\n the quick brown fox 😀", add_special_tokens=False).input_ids
    tail = vocabulary.encode(" the quick brown fox 😀")
    assert whole[-len(tail) :] == tail


@every_kind
def test_control_tokens_in_text_are_ordinary_text(kind: str) -> None:
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    for name in (tokenizer.eos_token, tokenizer.bos_token or "<|im_end|>"):
        text = f"a{name}b"
        ids = vocabulary.encode(text)
        assert not vocabulary.special_ids.intersection(ids)
        assert join(vocabulary, ids) == text.encode()


@every_kind
def test_specials_add_nothing_to_the_text(kind: str) -> None:
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    eos = tokenizer.eos_token_id
    assert vocabulary.stop_ids == {eos}
    assert eos in vocabulary.special_ids
    assert vocabulary.tokens[eos] == tokenizer.eos_token.encode()
    assert vocabulary.text_bytes(eos) == b""
    assert eos not in vocabulary.ids_by_bytes.values()


@every_kind
def test_padded_ids_have_no_bytes(kind: str) -> None:
    padded = from_tokenizer(TOKENIZERS[kind], SIZE + 5, [], kind)
    assert len(padded) == SIZE + 5
    assert padded.tokens[SIZE:] == [b""] * 5
    assert set(range(SIZE, SIZE + 5)) <= padded.special_ids
    assert b"" not in padded.ids_by_bytes


def test_control_tokens_past_the_table_are_dropped() -> None:
    tokenizer = byte_level(SIZE, "<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = from_tokenizer(tokenizer, SIZE, [0, SIZE, 10**6, -1], "m")
    assert len(vocabulary) == SIZE
    assert vocabulary.stop_ids == {0}
    assert SIZE not in vocabulary.special_ids


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'m'.*writes id \d+.*knows only 300"):
        from_tokenizer(TOKENIZERS["byte-level"], 300, [], "m")


def test_a_stop_id_that_is_no_special_adds_no_text() -> None:
    ordinary = VOCABULARIES["byte-level"].ids_by_bytes[b"e"]
    vocabulary = from_tokenizer(TOKENIZERS["byte-level"], SIZE, [ordinary], "m")
    assert ordinary not in vocabulary.special_ids
    assert vocabulary.text_bytes(ordinary) == b""
    assert b"e" not in vocabulary.ids_by_bytes


@pytest.mark.parametrize("kind", ["metaspace-first", "replace"])
def test_byte_fallback_tokens_are_single_bytes(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    for byte in (0x00, 0x0A, 0x41, 0xF0):
        token_id = TOKENIZERS[kind].convert_tokens_to_ids(f"<0x{byte:02X}>")
        assert vocabulary.tokens[token_id] == bytes([byte])
    assert len(vocabulary.encode("😀")) == 4


@pytest.mark.parametrize("kind", ["metaspace-first", "replace"])
def test_a_letters_own_token_beats_its_byte_fallback(kind: str) -> None:
    tokenizer, vocabulary = TOKENIZERS[kind], VOCABULARIES[kind]
    own, fallback = tokenizer.convert_tokens_to_ids(["A", "<0x41>"])
    assert vocabulary.tokens[own] == vocabulary.tokens[fallback] == b"A"
    assert fallback < own
    assert vocabulary.ids_by_bytes[b"A"] == own == vocabulary.encode("A")[0]


@every_kind
def test_ids_by_bytes_inverts_tokens(kind: str) -> None:
    vocabulary = VOCABULARIES[kind]
    for token, token_id in vocabulary.ids_by_bytes.items():
        assert vocabulary.tokens[token_id] == token
    ordinary = {t for i, t in enumerate(vocabulary.tokens) if t and i not in vocabulary.special_ids}
    assert ordinary == vocabulary.ids_by_bytes.keys()


@every_kind
def test_a_saved_tokenizer_has_the_same_fingerprint(kind: str, tmp_path: Path) -> None:
    TOKENIZERS[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = from_tokenizer(loaded, SIZE, [loaded.eos_token_id], "again")
    assert again.fingerprint == VOCABULARIES[kind].fingerprint


def test_the_fingerprint_tells_vocabularies_apart() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prints = {v.fingerprint for v in VOCABULARIES.values()}
    prints.add(from_tokenizer(tokenizer, SIZE + 1, [tokenizer.eos_token_id], "padded").fingerprint)
    prints.add(from_tokenizer(tokenizer, SIZE, [], "no stop").fingerprint)
    # The two Metaspace schemes and the prepending Replace differ in a text's beginning only, not in tokens.
    kinds = {"byte-level", "metaspace-first", "replace"}
    assert len(prints) >= len(kinds) + 2
    assert VOCABULARIES["metaspace-first"].fingerprint != VOCABULARIES["byte-level"].fingerprint


def test_the_fingerprint_sees_where_tokens_end() -> None:
    def made(*tokens: bytes) -> str:
        return Vocabulary(list(tokens), frozenset(), frozenset(), lambda _: []).fingerprint

    assert made(b"ab", b"c") != made(b"a", b"bc")
    assert made(b"ab", b"c") == made(b"ab", b"c")


def test_the_tokenizer_itself_is_left_as_it_was() -> None:
    tokenizer = metaspace(SIZE, "always")
    before = tokenizer.backend_tokenizer.to_str()
    from_tokenizer(tokenizer, SIZE, [2], "m").encode("some text")
    assert tokenizer.backend_tokenizer.to_str() == before


def test_added_tokens_keep_their_bytes_and_ids() -> None:
    tokenizer = byte_level(SIZE, "<eos>")
    tokenizer.add_tokens(["Ġodd▁token", AddedToken("\n\n\n", normalized=False)])
    vocabulary = from_tokenizer(tokenizer, SIZE + 2, [], "m")
    assert vocabulary.tokens[SIZE:] == ["Ġodd▁token".encode(), b"\n\n\n"]
    assert vocabulary.encode("a\n\n\nb")[1] == SIZE + 1
    assert not {SIZE, SIZE + 1} & vocabulary.special_ids


def word_level(normalizer: object = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a few whole words that knows nothing of byte alphabets."""
    words = ["<unk>", "Hello", "world", " ", "hello"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_plain_tokenizer_is_taken_at_its_word() -> None:
    tokenizer = word_level()
    with pytest.raises(UnsupportedModelError, match="can spell none"):
        from_tokenizer(tokenizer, 5, [], "words")
    letters = {chr(c): i for i, c in enumerate(sorted({ord(c) for s in PROOF_SAMPLES for c in s}))}
    backend = Tokenizer(models.WordLevel({**letters, "<unk>": len(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["<unk>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    vocabulary = from_tokenizer(wrapped, len(letters) + 1, [], "letters")
    assert vocabulary.tokens[letters["😀"]] == "😀".encode()
    assert join(vocabulary, vocabulary.encode("Hello")) == b"Hello"


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_sample() -> None:
    tokenizer = byte_level(SIZE, "<eos>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match=r"'small'.*Hello world.*became .hello world"):
        from_tokenizer(tokenizer, SIZE, [], "small")


def test_a_wrong_byte_table_is_refused() -> None:
    good = VOCABULARIES["byte-level"]
    tokens = list(good.tokens)
    tokens[good.ids_by_bytes[b"\n"]] = b"\r"
    with pytest.raises(UnsupportedModelError, match="do not join"):
        prove(Vocabulary(tokens, good.special_ids, good.stop_ids, good.encode), "m")


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'slow'.*object.*tokenizer\.json"):
        from_tokenizer(object(), 10, [], "slow")

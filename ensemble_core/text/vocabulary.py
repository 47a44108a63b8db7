"""Vocabularies: id -> bytes for every token of a member, its specials, its stop ids, its fingerprint.

Bytes are the one currency between members. This is the only file that knows how tokenizers spell bytes: the
byte-level alphabet (`Ġ`), SentencePiece's space (`▁`) and byte fallback (`<0x0A>`).

Invariant: a vocabulary made by `from_tokenizer` has proved itself: on samples in several scripts the joined
bytes of a text's tokens are the text. It does not know models, templates or how text grows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Tokenizer

from ensemble_core.errors import UnsupportedModelError
from ensemble_core.text.seams import Seams, find_seams

# Composed forms only: a normaliser (NFC) may rewrite text, which is no fault of the byte table.
PROOF_SAMPLES = (
    "Hello world, it's 2026! (a_b-c) <b>bold</b>",
    "  two spaces,\ttab\t\ttabs,\n\n\nnewlines\r\nand CRLF ",
    "def f(x):\n\tif x > 1:\n\t\treturn x**2  # ok\n",
    "Größe, déjà vu, naïve, Łódź, Привет мир, καλημέρα",
    "你好，世界。東京は日本の首都です。안녕하세요",
    "مرحبا بالعالم, שלום עולם, नमस्ते दुनिया, สวัสดี",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 ∑∞≠ \u200b½ ",
)
# A tokenizer.json with nothing in it: normaliser and pre-tokenizer are made from JSON by way of it.
_EMPTY: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@dataclass(frozen=True)
class Vocabulary:
    """One member's tokens as bytes.

    tokens: V entries; the bytes that a token adds to the text, b"" for ids that no token has.
    special_ids: control tokens (their bytes are their name; they add nothing to a completion's text).
    stop_ids: ids that end a text (generation config included); a subset of the specials is usual.
    encode: text that goes on from a prompt -> ids; adds nothing and reads no control token out of the text.
    seams: where a text may be cut before it is spelt; None where nothing is proved.
    """

    tokens: list[bytes] = field(repr=False)
    special_ids: frozenset[int] = field(repr=False)
    stop_ids: frozenset[int]
    encode: Callable[[str], list[int]] = field(repr=False, compare=False)
    seams: Seams | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a completion: none for specials and stop tokens."""
        if token_id in self.special_ids or token_id in self.stop_ids:
            return b""
        return self.tokens[token_id]

    def with_text(self, token_ids: Iterable[int]) -> Vocabulary:
        """The same with control tokens that add their names to a completion's text."""
        return replace(self, special_ids=self.special_ids - frozenset(token_ids))

    def name_of(self, token_id: int) -> str:
        """A token for people to read."""
        return readable(self.tokens[token_id])

    @cached_property
    def special_names(self) -> dict[str, int]:
        """Name -> id of every control token."""
        names = {self.name_of(token_id): token_id for token_id in sorted(self.special_ids, reverse=True)}
        names.pop("", None)  # ids that no token has
        return names

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all bytes, specials and stop ids: equal where two vocabularies mean the same."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little"))
            digest.update(token)
        digest.update(json.dumps([sorted(self.special_ids), sorted(self.stop_ids)]).encode())
        return digest.hexdigest()

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """Bytes -> id of every ordinary token.

        Of several ids with the same bytes (a letter and its byte-fallback token) the one stands that the
        tokenizer itself writes, else the lowest.
        """
        ordinary: dict[bytes, int] = {}
        for token_id, token in enumerate(self.tokens):
            if not token or token_id in self.special_ids or token_id in self.stop_ids:
                continue
            if token not in ordinary or self.encode(token.decode("utf-8", "replace")) == [token_id]:
                ordinary[token] = token_id
        return ordinary


def readable(token: bytes) -> str:
    """A token for people to read: its text, or its bytes in hex where they are no text by themselves."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def from_tokenizer(tokenizer: Any, size: int, stop_ids: Iterable[int], name: str) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    size: columns of the model's logits; ids past the tokenizer's own have no bytes. stop_ids: from the
    generation config. name: of the member, for messages. Raises UnsupportedModelError where the tokenizer has
    no tokenizer.json behind it, or where its bytes do not join to the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"member {name!r}: tokenizer {type(tokenizer).__name__} has no fast (tokenizers) form; save it "
            "with a tokenizer.json and name that folder"
        )
    pipeline = _pipeline(backend)
    continuation = _continuation_tokenizer(backend, pipeline)
    tokens = _token_bytes(backend, _speller(pipeline), size)
    added = backend.get_added_tokens_decoder()
    specials = {token_id for token_id, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    specials |= {token_id for token_id, token in enumerate(tokens) if not token}
    vocabulary = Vocabulary(
        tokens=tokens,
        special_ids=frozenset(i for i in specials if i < size),
        stop_ids=frozenset(i for i in stop_ids if 0 <= i < size),
        encode=lambda text: list(continuation.encode(text, add_special_tokens=False).ids),
        seams=_seams(continuation),
    )
    prove(vocabulary, name)
    return vocabulary


def prove(vocabulary: Vocabulary, name: str, samples: Iterable[str] = PROOF_SAMPLES) -> None:
    """Check that tokens' bytes join to the text they came from. Raises UnsupportedModelError with the sample.

    A character that the vocabulary cannot spell at all is no proof against its bytes: samples that need the
    unknown token are passed over, unless all are.
    """
    proved = 0
    for sample in samples:
        ids = vocabulary.encode(sample)
        if max(ids, default=0) >= len(vocabulary):
            raise UnsupportedModelError(
                f"member {name!r}: its tokenizer writes id {max(ids)}, but its model knows only "
                f"{len(vocabulary)}; the tokenizer belongs to another model"
            )
        if any(token_id in vocabulary.special_ids for token_id in ids):
            continue
        joined = b"".join(vocabulary.tokens[token_id] for token_id in ids)
        if joined != sample.encode():
            raise UnsupportedModelError(
                f"member {name!r}: its tokenizer's bytes do not join to the text: {sample!r} became "
                f"{joined.decode('utf-8', 'replace')!r}; this kind of tokenizer is not supported"
            )
        proved += 1
    if not proved:
        raise UnsupportedModelError(f"member {name!r}: its tokenizer can spell none of the proof samples")


def _pipeline(backend: Tokenizer) -> dict[str, Any]:
    """The sections of a tokenizer.json around the model, which alone is large (33 MB for 262,144 tokens)."""
    sections = ("normalizer", "pre_tokenizer", "decoder")
    found = {section: getattr(backend, section) for section in sections}
    return {section: part and json.loads(part.__getstate__()) for section, part in found.items()}


def _continuation_tokenizer(backend: Tokenizer, pipeline: dict[str, Any]) -> Tokenizer:
    """The same tokenizer without what belongs to a text's beginning, and blind to control tokens.

    It shares the model, so it costs no second copy of the merges.
    """
    pre_tokenizer = copy.deepcopy(pipeline["pre_tokenizer"])
    for part in _parts(pre_tokenizer, "pretokenizers"):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    normalizer = _without_prepend(pipeline["normalizer"])
    frame = Tokenizer.from_str(json.dumps(_EMPTY | {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}))
    tokenizer = Tokenizer(backend.model)
    if frame.normalizer is not None:
        tokenizer.normalizer = frame.normalizer
    if frame.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = frame.pre_tokenizer
    added = dict(sorted(backend.get_added_tokens_decoder().items()))
    tokenizer.add_tokens(list(added.values()))
    assert tokenizer.get_added_tokens_decoder().keys() == added.keys(), "added tokens changed their ids"
    tokenizer.encode_special_tokens = True
    return tokenizer


def _seams(continuation: Tokenizer) -> Seams | None:
    pipeline = _pipeline(continuation)
    normalizers = _parts(pipeline["normalizer"], "normalizers")
    pre_tokenizers = _parts(pipeline["pre_tokenizer"], "pretokenizers")
    return find_seams(continuation.model, continuation.get_added_tokens_decoder(), normalizers, pre_tokenizers)


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [part for part in normalizer["normalizers"] if part["type"] != "Prepend"]
        return {**normalizer, "normalizers": kept}
    return normalizer


def _parts(section: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A section of a tokenizer.json as a list, whether it is a sequence or a single part."""
    if section is None:
        return []
    if section["type"] == "Sequence":
        return list(section[key])
    return [section]


def _token_bytes(backend: Tokenizer, to_bytes: Callable[[str], bytes], size: int) -> list[bytes]:
    added = {i: token.content.encode() for i, token in backend.get_added_tokens_decoder().items()}
    tokens = [b""] * size
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id < size:
            tokens[token_id] = added.get(token_id) or to_bytes(token)
    return tokens


def _speller(pipeline: dict[str, Any]) -> Callable[[str], bytes]:
    """How this tokenizer writes bytes, read off its decoder and pre-tokenizer."""
    decoders = _parts(pipeline["decoder"], "decoders")
    pre_tokenizers = _parts(pipeline["pre_tokenizer"], "pretokenizers")
    kinds = {part["type"] for part in decoders + pre_tokenizers}
    if "ByteLevel" in kinds:
        return _byte_level
    replaces = any(part["type"] == "Replace" and part["content"] == " " for part in decoders)
    if "ByteFallback" in kinds or "Metaspace" in kinds or replaces:
        return _sentencepiece
    return str.encode


def _byte_level(token: str) -> bytes:
    table = _byte_level_table()
    if all(char in table for char in token):
        return bytes(table[char] for char in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.match(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}

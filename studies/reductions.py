"""Vocabularies reduced to smaller ones: every token as the symbols that it consists of, and the mass that begins so.

Two reductions of a member's tokens are known: to bytes, and to the common vocabulary (lossless vocabulary reduction,
arXiv 2510.08102): the largest set of byte strings that are tokens of every member, and whose merges, in every
member's own order, go through strings of the set alone. A token outside it is spelt by the member's own merges as far
as they stay inside (nested tokenization). Only BPE has merges; other tokenizers are refused by name.

Knows tokens, merges and log-probabilities; does not know texts, models or weights.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensemble_core.errors import EvaluationError
from ensemble_core.text.vocabulary import Vocabulary

Symbols = tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """Each token's symbols, by id; () for a token that adds nothing to a text."""

    sequences: Sequence[Symbols]

    @cached_property
    def order(self) -> Tensor:
        """(V',) int64: ids of tokens with symbols, so that tokens that begin alike are neighbours."""
        spelt = [token_id for token_id, symbols in enumerate(self.sequences) if symbols]
        return torch.tensor(sorted(spelt, key=lambda token_id: self.sequences[token_id]), dtype=torch.long)

    @cached_property
    def _keys(self) -> list[Symbols]:
        return [self.sequences[token_id] for token_id in self.order.tolist()]

    def beginning(self, prefix: Symbols) -> slice:
        """Where in `order` the tokens are whose symbols begin with `prefix`."""
        first = bisect_left(self._keys, prefix)
        return slice(first, bisect_right(self._keys, prefix, first, key=lambda symbols: symbols[: len(prefix)]))

    def spelling(self, whole: Symbols) -> slice:
        """Where in `order` the tokens are whose symbols are these and no more."""
        return slice(bisect_left(self._keys, whole), bisect_right(self._keys, whole))

    def along(self, logprobs: Tensor, path: Symbols) -> tuple[list[float], list[float]]:
        """Along a path of symbols: the mass of tokens that begin with its first 1, 2, ..., and that are just these.

        logprobs: (V,) of the next token. Ends where no token goes on.
        """
        first = self.beginning(path[:1])
        p = logprobs[self.order[first]].double().exp().numpy()
        begun: list[float] = []
        just: list[float] = []
        for end in range(1, len(path) + 1):
            within, whole = self.beginning(path[:end]), self.spelling(path[:end])
            if within.start == within.stop:
                break
            begun.append(float(p[within.start - first.start : within.stop - first.start].sum()))
            just.append(float(p[whole.start - first.start : whole.stop - first.start].sum()))
        return begun, just


def to_bytes(vocabulary: Vocabulary) -> Reduction:
    """Every token as its bytes."""
    return Reduction([tuple(vocabulary.text_bytes(token_id)) for token_id in range(len(vocabulary))])


@dataclass(frozen=True)
class Merges:
    """A BPE tokenizer's merges (Sennrich et al. 2016) over pieces, and the bytes that pieces spell.

    ranks: pair of pieces -> its place in the order of merges. pieces: id -> piece as the tokenizer writes it; ""
    for ids that no merge can make. bytes_of: piece -> bytes. byte_pieces: byte -> the piece that is this byte alone.
    """

    ranks: Mapping[tuple[str, str], int]
    pieces: Sequence[str]
    bytes_of: Mapping[str, bytes]
    byte_pieces: Mapping[int, str]

    def spell(self, piece: str, allowed: Collection[bytes] | None = None) -> tuple[list[str], set[str]]:
        """A piece's own spelling, and every piece that was merged on the way. allowed: None allows every piece.

        A character that is not allowed is spelt in bytes; a byte that the tokenizer lacks as its name, "<0x04>".
        """
        parts = [part for char in piece for part in self._characters(char, allowed)]
        made: set[str] = set()
        while True:
            known = [
                (rank, place)
                for place in range(len(parts) - 1)
                if (rank := self.ranks.get((parts[place], parts[place + 1]))) is not None
                and (allowed is None or self.bytes_of[parts[place] + parts[place + 1]] in allowed)
            ]
            if not known:
                return parts, made
            _, place = min(known)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            made.add(parts[place])

    def _characters(self, char: str, allowed: Collection[bytes] | None) -> list[str]:
        spelt = self.bytes_of.get(char)
        if spelt is not None and (allowed is None or spelt in allowed):
            return [char]
        return [self.byte_pieces.get(byte, f"<0x{byte:02X}>") for byte in spelt or char.encode()]

    def ancestry(self, token_id: int) -> set[bytes] | None:
        """The bytes of all pieces that a token is merged from, itself included; None if no merges lead to it."""
        parts, made = self.spell(self.pieces[token_id])
        if parts != [self.pieces[token_id]]:
            return None
        return {
            self.bytes_of[piece] for piece in (*made, *self.pieces[token_id], *parts) if piece in self.bytes_of
        }


def load_merges(tokenizer: Path, vocabulary: Vocabulary) -> Merges:
    """The merges of a tokenizer.json. Raises EvaluationError where it has none."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    return merges_of(model, vocabulary, str(tokenizer))


def merges_of(model: Mapping[str, Any], vocabulary: Vocabulary, origin: str) -> Merges:
    """The same of the section `model`. Raises EvaluationError."""
    if model.get("type") != "BPE":
        raise EvaluationError(
            f"{origin}: a {model.get('type')} model has no merges; the common vocabulary needs BPE"
        )
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    ids = {piece: i for piece, i in model["vocab"].items() if i < len(vocabulary) and vocabulary.text_bytes(i)}
    pieces = [""] * len(vocabulary)
    for piece, token_id in ids.items():
        pieces[token_id] = piece
    bytes_of = {piece: vocabulary.text_bytes(token_id) for piece, token_id in ids.items()}
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs) if left + right in bytes_of}
    return Merges(ranks, pieces, bytes_of, _byte_pieces(bytes_of))


def _byte_pieces(bytes_of: Mapping[str, bytes]) -> dict[int, str]:
    """Fallback pieces (`<0x0A>`) where there are any, since no merge takes them; else the byte-level alphabet."""
    by_length = sorted(bytes_of.items(), key=lambda item: len(item[0]))
    return {spelt[0]: piece for piece, spelt in by_length if len(spelt) == 1}


def common_vocabulary(vocabularies: Sequence[Vocabulary], merges: Sequence[Merges]) -> list[bytes]:
    """The common vocabulary, sorted.

    A string stays while, in every member, its token's merges go through strings that stay. Single bytes stay.
    """
    shared = set.intersection(*(set(vocabulary.ids_by_bytes) for vocabulary in vocabularies))
    needs: dict[bytes, set[bytes]] = {}
    for spelt in shared:
        found = [
            own.ancestry(vocabulary.ids_by_bytes[spelt])
            for vocabulary, own in zip(vocabularies, merges, strict=True)
        ]
        reachable = [each for each in found if each is not None]
        if len(spelt) == 1:
            needs[spelt] = set()
        elif len(reachable) == len(found):
            needs[spelt] = set().union(*reachable)
    return sorted(_closed(needs))


def _closed(needs: Mapping[bytes, set[bytes]]) -> set[bytes]:
    """The largest subset that has all that its strings need."""
    kept = set(needs)
    while lost := {spelt for spelt in kept if not needs[spelt] <= kept}:
        kept -= lost
    return kept


def to_common(vocabulary: Vocabulary, merges: Merges, common: Sequence[bytes]) -> Reduction:
    """Every token as tokens of the common vocabulary, by their places in it."""
    places = {spelt: place for place, spelt in enumerate(common)}
    return Reduction([_symbols(i, vocabulary, merges, places) for i in range(len(vocabulary))])


def _symbols(token_id: int, vocabulary: Vocabulary, merges: Merges, places: Mapping[bytes, int]) -> Symbols:
    """() for a token with a byte that not every member has."""
    spelt = vocabulary.text_bytes(token_id)
    if spelt in places:
        return (places[spelt],)
    if piece := merges.pieces[token_id]:
        parts = [merges.bytes_of.get(part, b"") for part in merges.spell(piece, places)[0]]
    else:  # an added token: no merge makes it
        parts = [bytes([byte]) for byte in spelt]
    return tuple(places[part] for part in parts) if all(part in places for part in parts) else ()

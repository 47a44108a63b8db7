"""A transfer matrix in memory, and the anchors that its columns stand for.

The relative representation of a member: a row per token, a column per anchor. Rows sum to 1 (or to 0, for
tokens without a counterpart, such as most control tokens). An anchor is a token that every member has, byte
for byte. Anchors are sorted; the last one is the class "end of text" (all stop ids of each member). Knows
neither files nor fusions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ensemble_core.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Anchors:
    """The shared columns: sorted byte strings, then one last column, "end of text"."""

    tokens: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.tokens) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 over the byte strings."""
        digest = hashlib.sha256()
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little"))
            digest.update(token)
        return digest.hexdigest()

    def ids(self, vocabulary: Vocabulary) -> Tensor:
        """(A,) int64: a member's own token for each anchor; for "end of text" its lowest stop id, else -1."""
        own = [vocabulary.ids_by_bytes[token] for token in self.tokens]
        return torch.tensor([*own, min(vocabulary.stop_ids, default=-1)])


def common_anchors(vocabularies: Sequence[Vocabulary]) -> Anchors:
    """Anchors of an ensemble: the byte strings that are an ordinary token in every vocabulary."""
    shared = set(vocabularies[0].ids_by_bytes)
    for vocabulary in vocabularies[1:]:
        shared &= vocabulary.ids_by_bytes.keys()
    return Anchors(tuple(sorted(shared)))


@dataclass(frozen=True)
class TransferMatrix:
    """Rows padded to the widest: used entries first, columns ascending; padding has column 0, value 0.

    anchor_ids: the member's own token for each anchor (see `Anchors.ids`).
    """

    columns: Tensor  # (V, k) int32
    values: Tensor  # (V, k) float16 or float32
    anchor_ids: Tensor  # (A,) int64

    @property
    def num_anchors(self) -> int:
        """A, including "end of text"."""
        return self.anchor_ids.shape[0]

    def rows(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (..., k) int64 and values (..., k) float32 of the given tokens (...)."""
        flat, shape = token_ids.flatten(), (*token_ids.shape, self.columns.shape[1])
        columns, values = self.columns.index_select(0, flat), self.values.index_select(0, flat)
        return columns.long().view(shape), values.float().view(shape)

    def to(self, device: torch.device) -> TransferMatrix:
        """The same matrix on `device`; returns itself, with its cached values, if it is already there."""
        if self.columns.device == device:
            return self
        return TransferMatrix(self.columns.to(device), self.values.to(device), self.anchor_ids.to(device))

    @cached_property
    def row_mass(self) -> Tensor:
        """(V,) float32: the sum of each row; about 1, or 0 for an empty row."""
        return self.values.float().sum(dim=1)

"""Keys and values of all sequences of one member: a pool of rows, each long enough for the longest sequence.

A row is contiguous, so that attention reads views and copies nothing; it is one page of the scheduler's
accounting. Sliding-window layers keep their full length (the window is masked), so rollback is exact: it is a
change of length. Invariants: a row belongs to one sequence or to none; lengths never exceed the row; a free row
holds zeros, since masked positions are multiplied by zero and not skipped: a number that is not finite would reach
the row's next holder.

Knows shapes and rows; does not know models, tokens or schedules.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Row:
    """One sequence's place in the pool."""

    index: int
    length: int = 0
    written: int = 0  # slots that a forward may have touched, failed ones and rolled back ones included


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer caches."""

    num_kv_heads: int
    head_size: int
    device: torch.device


class KVCache:
    """Rows of keys and values for every layer.

    keys[layer], values[layer]: (rows * row_len, Hkv, D): a token's slot is row * row_len + position.
    """

    def __init__(self, layers: list[LayerShape], num_rows: int, row_len: int, dtype: torch.dtype) -> None:
        self.num_rows, self.row_len, self.dtype = num_rows, row_len, dtype
        self.keys = [_zeros(layer, num_rows * row_len, dtype) for layer in layers]
        self.values = [_zeros(layer, num_rows * row_len, dtype) for layer in layers]
        self._rows: dict[int, Row] = {}
        self._free = list(range(num_rows))

    @property
    def num_free(self) -> int:
        """Rows that no sequence holds."""
        return len(self._free)

    def row(self, seq_id: int) -> Row:
        """The row of a sequence; an unknown one gets the lowest free row (low rows lie together)."""
        if seq_id not in self._rows:
            assert self._free, "no free row: the scheduler admitted more than fits"
            self._rows[seq_id] = Row(heapq.heappop(self._free))
        return self._rows[seq_id]

    def reserve(self, seq_id: int, num_new: int) -> Row:
        """The row of a sequence, whose next `num_new` slots are about to be written."""
        row = self.row(seq_id)
        assert 0 < num_new <= self.row_len - row.length, "a feed passes the end of its row"
        row.written = max(row.written, row.length + num_new)
        return row

    def rollback(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens."""
        row = self._rows[seq_id]
        assert 0 <= length <= row.length, f"rollback to {length} of {row.length}"
        row.length = length

    def fork(self, source: int, seq_id: int, length: int) -> None:
        """Copy the first `length` tokens of a row into the empty row of another sequence."""
        old, new = self._rows[source], self.row(seq_id)
        assert new.length == 0, "a fork begins a sequence"
        assert length <= old.length, f"a fork of {length} tokens from {old.length}"
        start, goal = old.index * self.row_len, new.index * self.row_len
        for tensor in (*self.keys, *self.values):
            tensor[goal : goal + length] = tensor[start : start + length]
        new.length, new.written = length, max(new.written, length)

    def release(self, seq_id: int) -> None:
        """Give a row back, wiped; an unknown sequence is fine."""
        row = self._rows.pop(seq_id, None)
        if row is None:
            return
        self._wipe(row)
        heapq.heappush(self._free, row.index)

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of keys and values."""
        sizes: dict[str, int] = {}
        for tensor in (*self.keys, *self.values):
            device = str(tensor.device)
            sizes[device] = sizes.get(device, 0) + tensor.numel() * tensor.element_size()
        return sizes

    def check(self) -> None:
        """Integrity: every row is free or held once, and no length passes the row. For tests and debugging."""
        held = [row.index for row in self._rows.values()]
        assert sorted(held + self._free) == list(range(self.num_rows)), "a row is lost or held twice"
        assert all(0 <= row.length <= row.written <= self.row_len for row in self._rows.values())

    def _wipe(self, row: Row) -> None:
        start = row.index * self.row_len
        for tensor in (*self.keys, *self.values):
            tensor[start : start + row.written].zero_()


def bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in bytes."""
    return sum(2 * layer.num_kv_heads * layer.head_size for layer in layers) * dtype.itemsize


def _zeros(layer: LayerShape, slots: int, dtype: torch.dtype) -> Tensor:
    shape = (slots, layer.num_kv_heads, layer.head_size)
    if layer.device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=layer.device)
    # numpy asks the system for zero pages, which cost memory only once they are written.
    size = slots * layer.num_kv_heads * layer.head_size * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)

"""Attention over a cache of rows: a pass that reads views of the pool and copies nothing.

Tokens of sequences with few new ones look at spans of the cache, each by itself, where there is a kernel for that.
The others go chunk by chunk, where there is a kernel for that, or by groups: a group is a run of neighbouring cache
rows with equally many new tokens, so that its keys and values are one view of the pool.

Knows rows and slots; does not know tokens, logits or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensemble_core.members.attention.base import folded_attention
from ensemble_core.members.cache.rows import CacheRow, KVCache
from ensemble_core.members.kernels.base import Chunk, ChunkAttention, SpanAttention, Spans

FEW = 16  # new tokens of a sequence up to which each looks at its span by itself
_MAX_WASTE = 1.5  # padded over real key positions at which a group is split


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring rows with T new tokens each: tokens [start, stop) of the pass."""

    first_row: int
    num_rows: int
    num_new: int  # T
    start: int
    longest: int  # longest row, new tokens included

    @property
    def stop(self) -> int:
        """One past the group's last token in the pass."""
        return self.start + self.num_rows * self.num_new


@dataclass(frozen=True, slots=True)
class _Window:
    """Key positions [begin, end) that a group looks at, and its additive mask (B, 1, T, L), if it needs one."""

    begin: int
    end: int
    mask: Tensor | None


@dataclass(slots=True)
class PackedPass:
    """One forward: which tokens go to which slots, and who attends to what. Masks are made once per window.

    The first `num_few` tokens attend by spans, those behind them by chunks or groups.
    """

    cache: KVCache
    groups: list[Group]
    positions: Tensor  # (N,) int64, on the CPU
    slots: Tensor  # (N,) int64, on the CPU
    num_few: int = 0
    by_spans: SpanAttention | None = None
    chunks: Sequence[tuple[int, int, Chunk]] = ()  # tokens [start, stop) of the pass; then there are no groups
    by_chunks: ChunkAttention | None = None
    _slots_on: dict[torch.device, Tensor] = field(default_factory=dict)
    _windows: dict[tuple[int | None, torch.device], list[_Window]] = field(default_factory=dict)
    _spans: dict[int | None, Spans] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        at: Tensor | None = None,
    ) -> Tensor:
        """See `base.Pass.attend`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        slots, row_len = self.slots_on(query.device), self.cache.row_len
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        if at is not None and self.by_spans is not None:
            return self.by_spans(query[at], keys, values, self._spans_at(at, window), scaling)
        parts = []
        if self.by_spans is not None and self.num_few:
            parts.append(self.by_spans(query[: self.num_few], keys, values, self.spans(window), scaling))
        if self.by_chunks is not None:
            parts += [
                self.by_chunks(query[start:stop], keys, values, chunk, window, scaling)
                for start, stop, chunk in self.chunks
            ]
        parts += [
            folded_attention(
                query[group.start : group.stop],
                _view(keys, row_len, group, seen),
                _view(values, row_len, group, seen),
                seen.mask,
                scaling,
            )
            for group, seen in zip(self.groups, self.windows(window, query.device), strict=True)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if at is None else out[at.to(out.device)]

    def spans(self, size: int | None) -> Spans:
        """Slots that each of the first `num_few` tokens looks at in layers whose window is `size`."""
        if size not in self._spans:
            self._spans[size] = _spans(self.slots[: self.num_few], self.positions[: self.num_few], size)
        return self._spans[size]

    def _spans_at(self, places: Tensor, size: int | None) -> Spans:
        return _spans(self.slots[places], self.positions[places], size)

    def slots_on(self, device: torch.device) -> Tensor:
        """The slots on a layer's device."""
        if device not in self._slots_on:
            self._slots_on[device] = self.slots.to(device)
        return self._slots_on[device]

    def windows(self, size: int | None, device: torch.device) -> list[_Window]:
        """One window a group for layers whose window is `size` (None: everything)."""
        key = (size, device)
        if key not in self._windows:
            self._windows[key] = [self._window(group, size, device) for group in self.groups]
        return self._windows[key]

    def _window(self, group: Group, size: int | None, device: torch.device) -> _Window:
        at = self.positions[group.start : group.stop].view(group.num_rows, 1, group.num_new, 1)
        begin = 0 if size is None else max(0, int(at.min()) - size + 1)
        keys = torch.arange(begin, group.longest)
        seen = keys <= at  # (B, 1, T, L)
        if size is not None:
            seen &= keys > at - size
        if bool(seen.all()):
            return _Window(begin, group.longest, None)
        mask = torch.zeros(seen.shape, dtype=self.cache.dtype).masked_fill_(~seen, -torch.inf)
        return _Window(begin, group.longest, mask.to(device))


def _spans(slots: Tensor, positions: Tensor, size: int | None) -> Spans:
    """What tokens that lie in `slots` and have these positions look at in layers whose window is `size`."""
    back = positions if size is None else positions.clamp_max(size - 1)
    return Spans(slots - back, slots + 1, int(back.sum()) + len(back))


def pack(
    cache: KVCache,
    rows: Sequence[CacheRow],
    counts: Sequence[int],
    by_spans: SpanAttention | None = None,
    few: int = FEW,
    by_chunks: ChunkAttention | None = None,
) -> tuple[PackedPass, list[int]]:
    """Order the sequences of a forward and group them.

    rows, counts: each sequence's row and number of new tokens. by_spans: what attends for sequences with up to `few`
    of them, by_chunks: for those with more; None to group them. Returns the pass and the order: position in the pass
    -> index in `rows`.
    """
    order = sorted(range(len(rows)), key=lambda i: (counts[i], rows[i].index))
    num_few = sum(count for count in counts if count <= few) if by_spans is not None else 0
    groups: list[Group] = []
    chunks: list[tuple[int, int, Chunk]] = []
    positions: list[int] = []
    slots: list[int] = []
    for i in order:
        row, count = rows[i], counts[i]
        at, start = len(positions), row.index * cache.row_len
        if at >= num_few and by_chunks is not None:
            chunks.append((at, at + count, Chunk(start, row.length)))
        elif at >= num_few:
            _join(groups, row, count, at)
        positions.extend(range(row.length, row.length + count))
        slots.extend(range(start + row.length, start + row.length + count))
    places, at_slots = torch.tensor(positions), torch.tensor(slots)
    return PackedPass(cache, groups, places, at_slots, num_few, by_spans, chunks, by_chunks), order


def _join(groups: list[Group], row: CacheRow, count: int, start: int) -> None:
    """Put a row into the last group if it is its neighbour and of like length, else into a new one."""
    length = row.length + count
    if groups:
        last = groups[-1]
        adjacent = last.num_new == count and last.first_row + last.num_rows == row.index
        longest, shortest = max(last.longest, length), min(last.longest, length)
        if adjacent and longest <= _MAX_WASTE * shortest + 64:
            groups[-1] = Group(last.first_row, last.num_rows + 1, count, last.start, longest)
            return
    groups.append(Group(row.index, 1, count, start, length))


def _view(pool: Tensor, row_len: int, group: Group, window: _Window) -> Tensor:
    """(B, Hkv, L, D): the group's rows of a pool, without a copy."""
    rows = pool.view(-1, row_len, *pool.shape[1:])
    part = rows[group.first_row : group.first_row + group.num_rows, window.begin : window.end]
    return part.transpose(1, 2)

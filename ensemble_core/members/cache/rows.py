"""Keys and values of all sequences of one member: a pool of rows, each long enough for the longest sequence.

A row is contiguous, so that attention reads views and copies nothing; it is one page of the scheduler's
accounting. Sliding-window layers keep their full length (the window is masked), so rollback is exact: it is a
change of length. A row that is released may stay as a cached prefix, until its place is needed; the least recently
used goes first. A sequence begins with the longest prefix that a running or a cached row has in common with it,
copied into its own row. Rows of different salts have nothing to do with each other.

Invariants: a row belongs to one sequence, to one prefix, or to nobody; lengths never exceed the row; a new sequence
gets the lowest row that no sequence holds (low rows lie together, and attention reads neighbours at once), so
prefixes make way; every slot past a row's end that no forward has written since holds zeros, and no prefix holds a
number that is not finite: masked positions are multiplied by zero and not skipped, so such a number would reach the
row's next holder.

Knows shapes, rows and token ids; does not know models or schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ensemble_core.members.cache.base import MIN_PREFIX, LayerShape, longest_shared, tensor_bytes, zeros


@dataclass(slots=True)
class CacheRow:
    """One sequence's place in the pool, or a cached prefix's.

    token_ids: what the first `length` slots hold. num_finite: how many of them are known to be finite. salt: only
    sequences of the same one take it over.
    """

    index: int
    length: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_finite: int = 0
    salt: str = ""


class KVCache:
    """Rows of keys and values for every layer.

    keys[layer], values[layer]: (rows * row_len, Hkv, D): a token's slot is row * row_len + position.
    """

    def __init__(self, layers: list[LayerShape], num_rows: int, row_len: int, dtype: torch.dtype) -> None:
        self.num_rows, self.row_len, self.dtype = num_rows, row_len, dtype
        self.keys = [zeros(layer, num_rows * row_len, dtype) for layer in layers]
        self.values = [zeros(layer, num_rows * row_len, dtype) for layer in layers]
        self._rows: dict[int, CacheRow] = {}
        self._prefixes: list[CacheRow] = []  # least recently used first
        self._written = [0] * num_rows  # slots of each row that may hold something, failed ones too

    @property
    def head_sizes(self) -> set[int]:
        """Of all layers."""
        return {keys.shape[2] for keys in self.keys}

    @property
    def page_size(self) -> int:
        """A page is a row."""
        return self.row_len

    @property
    def num_pages(self) -> int:
        """Rows."""
        return self.num_rows

    @property
    def num_free(self) -> int:
        """Rows that no sequence holds."""
        return self.num_rows - len(self._rows)

    def length(self, seq_id: int) -> int:
        """Tokens cached of a sequence; 0 for an unknown one."""
        return self._rows[seq_id].length if seq_id in self._rows else 0

    @property
    def prefixes(self) -> list[list[int]]:
        """The token ids of what is cached beyond the running sequences, least recently used first."""
        return [list(row.token_ids) for row in self._prefixes]

    def row(self, seq_id: int, salt: str = "") -> CacheRow:
        """The row of a sequence; an unknown one gets the lowest row that no sequence holds, empty."""
        if seq_id not in self._rows:
            self._begin(seq_id, None, 0, salt)
        return self._rows[seq_id]

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Cache.reuse`."""
        assert seq_id not in self._rows, "a prefix begins a sequence"
        rows = [row for row in (*self._rows.values(), *self._prefixes) if row.salt == salt]
        found, length = longest_shared((row.token_ids for row in rows), list(token_ids))
        if not length:
            return 0
        source = rows[found]
        if source in self._prefixes:
            self._touch(source)
        elif source.num_finite < length:
            if not self._finite(source, length):
                return 0
            source.num_finite = length
        self._begin(seq_id, source, length, salt)
        return length

    def reserve(self, seq_id: int, num_new: int, salt: str = "") -> CacheRow:
        """The row of a sequence, whose next `num_new` slots are about to be written. salt: of a new one."""
        row = self.row(seq_id, salt)
        assert 0 < num_new <= self.row_len - row.length, "a feed passes the end of its row"
        self._written[row.index] = max(self._written[row.index], row.length + num_new)
        return row

    def advance(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """A forward has written these tokens."""
        row = self._rows[seq_id]
        row.token_ids.extend(token_ids)
        row.length += len(token_ids)

    def rollback(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens; 0 of an unknown sequence is fine."""
        assert 0 <= length <= self.length(seq_id), f"rollback to {length} of {self.length(seq_id)}"
        if row := self._rows.get(seq_id):
            row.length, row.num_finite = length, min(row.num_finite, length)
            del row.token_ids[length:]

    def release(self, seq_id: int, keep: bool = False) -> None:
        """Give a row back, wiped, or keep it as a cached prefix; an unknown sequence is fine.

        A row that is short, not finite, or begins another one's prefix is not kept.
        """
        row = self._rows.pop(seq_id, None)
        if row is None:
            return
        if keep and self._is_worth_keeping(row):
            for old in [old for old in self._prefixes if _begins(old, row)]:
                self._prefixes.remove(old)
                self._wipe(old.index, 0)
            self._prefixes.append(row)
            self._wipe(row.index, row.length)
        else:
            self._wipe(row.index, 0)

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of keys and values."""
        return tensor_bytes((*self.keys, *self.values))

    def check(self) -> None:
        """Integrity: rows, lengths and ids agree. For tests and debugging."""
        rows = [*self._rows.values(), *self._prefixes]
        held = {row.index: row.length for row in rows}
        assert len(held) == len(rows), "a row is lost or held twice"
        assert set(held) <= set(range(self.num_rows)), "a row is none of the pool's"
        written = self._written
        assert all(0 <= held.get(i, 0) <= n <= self.row_len for i, n in enumerate(written)), "a length is too long"
        assert all(n == 0 for i, n in enumerate(written) if i not in held), "a row is not wiped"
        assert all(written[row.index] == row.length for row in self._prefixes), (
            "a prefix is not wiped past its end"
        )
        assert all(len(row.token_ids) in (0, row.length) for row in rows), "the ids are not those of the row"
        assert all(row.num_finite <= row.length for row in rows), "slots past the end are known to be finite"

    def _begin(self, seq_id: int, source: CacheRow | None, length: int, salt: str) -> None:
        """Give a sequence its row, with the first `length` tokens of `source`."""
        assert self.num_free, "no free row: the scheduler admitted more than fits"
        held = {row.index for row in self._rows.values()}
        row = CacheRow(next(i for i in range(self.num_rows) if i not in held), salt=salt)
        origin = source.index if source is not None else row.index  # what stands there is copied, wherever it goes
        self._make_way(row.index, held)
        if source is not None:
            if origin != row.index:
                self._copy(source.index, row.index, length)
            row.length, row.num_finite, row.token_ids = length, length, source.token_ids[:length]
        self._wipe(row.index, length)
        self._rows[seq_id] = row

    def _make_way(self, index: int, held: set[int]) -> None:
        """Move the prefix that lies in row `index`, if there is one, to an empty row or to the least used one's."""
        prefix = next((row for row in self._prefixes if row.index == index), None)
        if prefix is None:
            return
        taken = held | {row.index for row in self._prefixes}
        goal = next((i for i in range(self.num_rows) if i not in taken), None)
        if goal is None:
            goal = self._prefixes.pop(0).index
        if goal != index:
            self._copy(index, goal, prefix.length)
            self._wipe(goal, prefix.length)
            prefix.index = goal

    def _copy(self, source: int, goal: int, length: int) -> None:
        start, to = source * self.row_len, goal * self.row_len
        for tensor in (*self.keys, *self.values):
            tensor[to : to + length] = tensor[start : start + length]
        self._written[goal] = max(self._written[goal], length)

    def _wipe(self, index: int, length: int) -> None:
        """Zero what was written in a row past its first `length` slots."""
        start, written = index * self.row_len, self._written[index]
        if written > length:
            for tensor in (*self.keys, *self.values):
                tensor[start + length : start + written].zero_()
        self._written[index] = length

    def _touch(self, prefix: CacheRow) -> None:
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def _is_worth_keeping(self, row: CacheRow) -> bool:
        known = len(row.token_ids) == row.length >= MIN_PREFIX
        longer = next((old for old in self._prefixes if known and _begins(row, old)), None)
        if longer is not None:
            self._touch(longer)
        return known and longer is None and self._finite(row, row.length)

    def _finite(self, row: CacheRow, length: int) -> bool:
        """Whether the first `length` slots hold finite numbers alone; a sum that overflows counts as not."""
        start = row.index * self.row_len
        sums = [t[start : start + length].sum(dtype=torch.float32) for t in (*self.keys, *self.values)]
        return all(math.isfinite(total.item()) for total in sums)


def _begins(short: CacheRow, long: CacheRow) -> bool:
    at = short.length - 1  # where most that differ do
    alike = short.salt == long.salt and long.token_ids[at : at + 1] == short.token_ids[-1:]
    return alike and long.token_ids[: at + 1] == short.token_ids

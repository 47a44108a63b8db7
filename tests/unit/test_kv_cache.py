"""The cache's accounting under random operations, and that a free row holds nothing."""

from __future__ import annotations

import heapq
import random

import pytest
import torch

from ensemble_core.members.cache.base import MIN_PREFIX, LayerShape, bytes_per_token, longest_shared
from ensemble_core.members.cache.rows import KVCache

CPU = torch.device("cpu")
LAYERS = [LayerShape(2, 4, CPU), LayerShape(1, 8, CPU)]


def cache(num_rows: int = 5, row_len: int = 12, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(LAYERS, num_rows, row_len, dtype)


def write(pool: KVCache, seq_id: int, count: int, value: float = 1.0) -> None:
    """What a forward does: reserve, write every layer, advance."""
    row = pool.reserve(seq_id, count)
    start = row.index * pool.row_len + row.length
    for tensor in (*pool.keys, *pool.values):
        tensor[start : start + count] = value
    row.length += count


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_the_accounts(seed: int) -> None:
    """Against a plain model: sequence -> (row, length), and the lowest free row goes first."""
    rng, pool = random.Random(seed), cache()
    rows: dict[int, int] = {}
    lengths: dict[int, int] = {}
    free = list(range(pool.num_rows))
    for _ in range(300):
        seq_id = rng.randrange(8)
        action = rng.choice(["write", "write", "rollback", "release"])
        if action == "write" and (seq_id in rows or free) and lengths.get(seq_id, 0) < pool.row_len:
            if seq_id not in rows:
                rows[seq_id], lengths[seq_id] = heapq.heappop(free), 0
            count = rng.randint(1, pool.row_len - lengths[seq_id])
            write(pool, seq_id, count)
            lengths[seq_id] += count
        elif action == "rollback" and seq_id in rows:
            lengths[seq_id] = rng.randint(0, lengths[seq_id])
            pool.rollback(seq_id, lengths[seq_id])
        elif action == "release":
            pool.release(seq_id)
            if seq_id in rows:
                heapq.heappush(free, rows.pop(seq_id))
                del lengths[seq_id]
        pool.check()
        assert pool.num_free == len(free)
        assert {s: (pool.row(s).index, pool.row(s).length) for s in rows} == {
            s: (rows[s], lengths[s]) for s in rows
        }
        for index in free:
            place = slice(index * pool.row_len, (index + 1) * pool.row_len)
            assert all(not tensor[place].any() for tensor in (*pool.keys, *pool.values))


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf])
def test_a_released_row_is_wiped_even_where_it_was_rolled_back(value: float) -> None:
    pool = cache()
    write(pool, 1, 3)
    write(pool, 2, 9, value)
    pool.rollback(2, 4)
    pool.reserve(2, 2)  # a forward that failed: written, not advanced
    pool.release(2)
    assert all(not tensor[pool.row_len :].any() for tensor in (*pool.keys, *pool.values))
    assert all((tensor[:3] == 1.0).all() for tensor in (*pool.keys, *pool.values))


def test_misuse_trips_an_assertion() -> None:
    pool = cache(num_rows=1)
    write(pool, 1, 5)
    with pytest.raises(AssertionError, match="passes the end"):
        pool.reserve(1, 8)
    with pytest.raises(AssertionError, match="rollback to 6 of 5"):
        pool.rollback(1, 6)
    with pytest.raises(AssertionError, match="no free row"):
        pool.row(2)
    pool.release(99)
    assert pool.num_free == 0


def test_check_finds_a_row_held_twice_and_a_lost_one() -> None:
    pool = cache()
    write(pool, 1, 2)
    write(pool, 2, 2)
    pool.row(2).index = 0
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check()


def test_check_finds_a_length_past_the_row() -> None:
    pool = cache()
    write(pool, 1, 2)
    pool.row(1).length = 13
    with pytest.raises(AssertionError):
        pool.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(dtype: torch.dtype) -> None:
    pool = cache(dtype=dtype)
    per_token = bytes_per_token(LAYERS, dtype)
    assert per_token == 2 * (2 * 4 + 1 * 8) * dtype.itemsize
    assert pool.num_bytes() == {"cpu": per_token * 5 * 12}
    assert [tuple(tensor.shape) for tensor in pool.keys] == [(60, 2, 4), (60, 1, 8)]
    assert all(tensor.dtype is dtype for tensor in (*pool.keys, *pool.values))


class Walk:
    """A pool, and a plain account of it: every slot's token by sequence, and the prefixes in order of their use."""

    def __init__(self, seed: int) -> None:
        self.rng, self.pool = random.Random(seed), cache(num_rows=self.num_rows(seed), row_len=40)
        self.running: dict[int, list[int]] = {}
        self.kept: list[list[int]] = []
        self.next_id = 0

    @staticmethod
    def num_rows(seed: int) -> int:
        return 1 + seed % 5

    def prompt(self) -> list[int]:
        """Often like one that was there."""
        known = [*self.running.values(), *self.kept]
        head = list(self.rng.choice(known)) if known and self.rng.random() < 0.8 else []
        head = head[: self.rng.randint(0, len(head))]
        return (head + [self.rng.randint(1, 3) for _ in range(self.rng.randint(1, 30))])[:35]

    def begin(self) -> None:
        if len(self.running) == self.pool.num_rows:
            return
        ids, self.next_id = self.prompt(), self.next_id + 1
        best = max((shared(ids[:-1], row) for row in (*self.running.values(), *self.kept)), default=0)
        length = self.pool.reuse(self.next_id, ids[:-1])
        assert length == (best if best >= MIN_PREFIX else 0)
        self.running[self.next_id] = ids[:length]
        if length:
            self.note_use(ids[:length])
        self.make_way()
        write_ids(self.pool, self.next_id, ids[length:])
        self.running[self.next_id] = ids

    def note_use(self, ids: list[int]) -> None:
        """A running row serves before a kept one; of equals the one that the pool looks at first."""
        if any(shared(ids, row) == len(ids) for seq, row in self.running.items() if seq != self.next_id):
            return
        used = next(row for row in self.kept if row[: len(ids)] == ids)
        self.kept.remove(used)
        self.kept.append(used)

    def make_way(self) -> None:
        while len(self.running) + len(self.kept) > self.pool.num_rows:
            self.kept.pop(0)

    def grow(self) -> None:
        if self.running:
            seq = self.rng.choice(list(self.running))
            more = [self.rng.randint(1, 3) for _ in range(self.rng.randint(1, 4))]
            if len(self.running[seq]) + len(more) <= self.pool.row_len:
                write_ids(self.pool, seq, more)
                self.running[seq] = self.running[seq] + more

    def rollback(self) -> None:
        if self.running:
            seq = self.rng.choice(list(self.running))
            self.running[seq] = self.running[seq][: self.rng.randint(0, len(self.running[seq]))]
            self.pool.rollback(seq, len(self.running[seq]))

    def release(self) -> None:
        if not self.running:
            return
        seq, keep = self.rng.choice(list(self.running)), self.rng.random() < 0.8
        ids = self.running.pop(seq)
        self.pool.release(seq, keep)
        longer = next((row for row in self.kept if row[: len(ids)] == ids), None)
        if keep and len(ids) >= MIN_PREFIX:
            if longer is not None:
                self.kept.remove(longer)
            self.kept = [row for row in self.kept if ids[: len(row)] != row] + [longer or ids]

    def check(self) -> None:
        self.pool.check()
        assert self.pool.num_free == self.pool.num_rows - len(self.running)
        assert self.pool.prefixes == self.kept
        rows = {self.pool.row(seq).index: ids for seq, ids in self.running.items()}
        lowest = min(set(range(self.pool.num_rows)) - set(rows), default=self.pool.num_rows)
        assert all(self.pool.row(seq).token_ids == ids for seq, ids in self.running.items())
        contents = [slots(self.pool, index) for index in range(self.pool.num_rows)]
        for index, ids in rows.items():
            assert contents[index][: len(ids)] == ids
        others = [row for index, row in enumerate(contents) if index not in rows and any(row)]
        assert sorted(others) == sorted([*ids, *[0] * (40 - len(ids))] for ids in self.kept)
        assert self.next_row() == lowest

    def next_row(self) -> int:
        held = {self.pool.row(seq).index for seq in self.running}
        return min(set(range(self.pool.num_rows)) - held, default=self.pool.num_rows)


def shared(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def write_ids(pool: KVCache, seq_id: int, ids: list[int]) -> None:
    """A forward whose keys and values are the ids themselves."""
    row = pool.reserve(seq_id, len(ids))
    start = row.index * pool.row_len + row.length
    for tensor in (*pool.keys, *pool.values):
        tensor[start : start + len(ids)] = torch.tensor(ids, dtype=tensor.dtype).view(-1, 1, 1)
    pool.advance(seq_id, ids)


def slots(pool: KVCache, index: int) -> list[int]:
    """What a row holds, which must be the same in every layer, head and column."""
    place = slice(index * pool.row_len, (index + 1) * pool.row_len)
    found = [tensor[place].flatten(1) for tensor in (*pool.keys, *pool.values)]
    assert all((part == part[:, :1]).all() and torch.equal(part[:, 0], found[0][:, 0]) for part in found)
    return [int(value) for value in found[0][:, 0]]


@pytest.mark.parametrize("seed", range(25))
def test_a_random_walk_with_prefixes(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(120):
        walk.rng.choice([walk.begin, walk.begin, walk.grow, walk.rollback, walk.release])()
        walk.check()
    for seq in walk.running:
        walk.pool.release(seq)
    assert walk.pool.num_free == walk.pool.num_rows


IDS = [1 + i % 7 for i in range(30)]


def pool_with(ids: list[int], num_rows: int = 3) -> KVCache:
    pool = cache(num_rows=num_rows, row_len=40)
    write_ids(pool, 1, ids)
    return pool


def test_a_new_sequence_takes_the_lowest_row_and_prefixes_make_way() -> None:
    pool = pool_with(IDS)
    pool.release(1, keep=True)
    assert (slots(pool, 0)[:30], pool.num_free) == (IDS, 3)
    assert pool.reuse(2, IDS[:20]) == 20
    assert pool.row(2).index == 0
    assert (slots(pool, 0)[:21], slots(pool, 1)[:30]) == ([*IDS[:20], 0], IDS)
    write_ids(pool, 3, [9] * 3)
    assert pool.row(3).index == 1
    assert slots(pool, 2)[:30] == IDS
    pool.row(4)
    assert pool.prefixes == []
    assert not any(slots(pool, 2))


def test_the_least_recently_used_goes_first() -> None:
    pool = cache(num_rows=3, row_len=40)
    prompts = [[first, *IDS[:20]] for first in (11, 12, 13)]
    for seq, ids in enumerate(prompts):
        write_ids(pool, seq, ids)
    for seq in range(3):
        pool.release(seq, keep=True)
    assert pool.reuse(7, prompts[0]) == 21
    assert pool.prefixes == [prompts[2], prompts[0]]
    pool.release(7, keep=True)
    assert pool.prefixes == [prompts[2], prompts[0]], "a row that is cached already is kept once"


def test_a_row_that_goes_on_from_a_prefix_replaces_it() -> None:
    pool = pool_with(IDS[:20])
    pool.release(1, keep=True)
    assert pool.reuse(2, IDS[:20]) == 20
    write_ids(pool, 2, IDS[20:])
    pool.release(2, keep=True)
    assert pool.prefixes == [IDS]


@pytest.mark.parametrize("length", [MIN_PREFIX - 1, MIN_PREFIX])
def test_a_short_prefix_is_not_worth_it(length: int) -> None:
    pool = pool_with(IDS[:length])
    assert pool.reuse(2, IDS) == (length if length >= MIN_PREFIX else 0)
    pool.release(1, keep=True)
    assert pool.prefixes == ([IDS[:length]] if length >= MIN_PREFIX else [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_row_that_is_not_finite_is_never_reused(value: float, where: str) -> None:
    pool = pool_with(IDS)
    tensor = pool.keys[1] if where == "key" else pool.values[0]
    tensor[17, 0, 2] = value
    assert pool.reuse(2, IDS[:17]) == 17, "the part before it is sound"
    assert pool.reuse(3, IDS) == 0
    pool.release(2)
    pool.release(1, keep=True)
    assert pool.prefixes == []
    assert not any(slots(pool, 0))


def test_what_is_written_anew_is_looked_at_anew() -> None:
    """A row that was found finite, was rolled back and is not finite any more."""
    pool = pool_with(IDS)
    assert pool.reuse(2, IDS) == 30
    pool.rollback(1, 20)
    write_ids(pool, 1, [8] * 5)
    pool.keys[1][22, 0, 2] = torch.nan
    assert pool.reuse(3, [*IDS[:20], *[8] * 5]) == 0
    pool.release(2)
    assert pool.reuse(3, IDS) == 20, "the part before it is sound"
    pool.check()


def test_a_prefix_that_many_take_over_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, asked = cache(num_rows=8, row_len=40), []
    write_ids(pool, 1, IDS)
    look = pool._finite
    monkeypatch.setattr(pool, "_finite", lambda row, length: asked.append(length) or look(row, length))
    assert [pool.reuse(seq_id, IDS[:29]) for seq_id in range(2, 8)] == [29] * 6
    assert asked == [29]


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_prefix_is_found(seed: int) -> None:
    """Against a plain search, over rows that share beginnings of every length; the first of equals counts."""
    rng = random.Random(seed)
    stem = [rng.randrange(3) for _ in range(60)]
    rows = [
        [*stem[: rng.randint(0, 60)], *(rng.randrange(3) for _ in range(rng.randint(0, 20)))]
        for _ in range(rng.randint(0, 12))
    ]
    wanted = [*stem[: rng.randint(0, 60)], *(rng.randrange(3) for _ in range(rng.randint(0, 3)))]
    lengths = [shared_length(row, wanted) for row in rows]
    longest = max(lengths, default=0)
    found, length = longest_shared(rows, wanted)
    if longest < MIN_PREFIX:
        assert (found, length) == (-1, 0)
    else:
        assert length == longest
        assert found == lengths.index(longest)


def shared_length(left: list[int], right: list[int]) -> int:
    return next((n for n in range(min(len(left), len(right)), -1, -1) if left[:n] == right[:n]), 0)


def test_a_failed_forward_leaves_nothing_behind_in_a_prefix() -> None:
    pool = pool_with(IDS)
    write(pool, 2, 4, 1.0)
    row = pool.reserve(1, 5)
    pool.keys[0][row.index * 40 + 30 : row.index * 40 + 35] = torch.nan  # written, not advanced
    pool.rollback(1, 25)
    pool.release(1, keep=True)
    assert slots(pool, 0) == [*IDS[:25], *[0] * 15]


def test_a_prefix_begins_a_sequence() -> None:
    pool = pool_with(IDS)
    with pytest.raises(AssertionError, match="begins a sequence"):
        pool.reuse(1, IDS)


def test_check_finds_a_prefix_in_a_held_row() -> None:
    pool = pool_with(IDS)
    pool.release(1, keep=True)
    write(pool, 2, 2)
    pool.row(2).index = 1
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check()

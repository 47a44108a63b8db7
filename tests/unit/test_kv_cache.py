"""The cache's accounting under random operations, and that a free row holds nothing."""

from __future__ import annotations

import heapq
import random

import pytest
import torch

from ensemble_core.members.kv_cache import KVCache, LayerShape, bytes_per_token

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


@pytest.mark.parametrize("length", [0, 1, 5, 9])
def test_a_fork_copies_exactly_so_much(length: int) -> None:
    pool = cache()
    write(pool, 1, 2)
    for step in range(9):
        write(pool, 7, 1, float(step + 1))
    before = [tensor.clone() for tensor in (*pool.keys, *pool.values)]
    pool.fork(7, 3, length)
    pool.check()
    source, goal = (pool.row(seq_id).index * pool.row_len for seq_id in (7, 3))
    for tensor, old in zip((*pool.keys, *pool.values), before, strict=True):
        assert torch.equal(tensor[goal : goal + length], old[source : source + length])
        assert not tensor[goal + length : goal + pool.row_len].any()
        assert torch.equal(tensor[:goal], old[:goal])
    write(pool, 3, 2, 99.0)
    assert all(not (tensor[source : source + 12] == 99.0).any() for tensor in (*pool.keys, *pool.values))
    pool.release(7)
    assert (pool.row(3).length, pool.num_free) == (length + 2, 3)
    pool.release(3)
    assert all(not tensor[goal : goal + pool.row_len].any() for tensor in (*pool.keys, *pool.values))


def test_a_fork_into_a_row_that_was_rolled_back_is_wiped_in_whole() -> None:
    pool = cache()
    write(pool, 1, 3)
    write(pool, 2, 8)
    pool.rollback(2, 0)
    pool.fork(1, 2, 3)
    pool.release(2)
    assert all(not tensor[pool.row_len :].any() for tensor in (*pool.keys, *pool.values))


def test_wrong_forks_trip_an_assertion() -> None:
    pool = cache()
    write(pool, 1, 3)
    write(pool, 2, 1)
    with pytest.raises(AssertionError, match="begins a sequence"):
        pool.fork(1, 2, 1)
    with pytest.raises(AssertionError, match="fork of 4 tokens from 3"):
        pool.fork(1, 3, 4)

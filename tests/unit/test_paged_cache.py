"""The pages' accounts under random operations: what every chain reads is its own text, and nothing is lost."""

from __future__ import annotations

import random

import pytest
import torch

from ensemble_core.members.cache.base import MIN_PREFIX, LayerShape, bytes_per_token
from ensemble_core.members.cache.pages import PagedCache

CPU = torch.device("cpu")
LAYERS = [LayerShape(2, 4, CPU), LayerShape(1, 8, CPU)]
IDS = [1 + i % 7 for i in range(30)]


def cache(num_pages: int = 12, page_size: int = 4, max_len: int = 40) -> PagedCache:
    return PagedCache(LAYERS, num_pages, page_size, max_len, torch.float32)


def write_ids(pool: PagedCache, seq_id: int, ids: list[int], poison: float | None = None) -> None:
    """A forward whose keys and values are the ids themselves, or something else at their last place."""
    chain = pool.reserve(seq_id, len(ids))
    places = range(chain.length, chain.length + len(ids))
    slots = [chain.pages[i // pool.page_size] * pool.page_size + i % pool.page_size for i in places]
    values = torch.tensor([float(token_id) for token_id in ids])
    if poison is not None:
        values[-1] = poison
    for tensor in (*pool.keys, *pool.values):
        tensor[slots] = values.view(-1, 1, 1)
    pool.advance(seq_id, ids)


def read(pool: PagedCache, pages: list[int], length: int) -> list[float]:
    """What a chain's slots hold, which must be the same in every layer, head and column."""
    slots = [pages[i // pool.page_size] * pool.page_size + i % pool.page_size for i in range(length)]
    found = [tensor[slots].flatten(1) for tensor in (*pool.keys, *pool.values)]
    assert all((part == part[:, :1]).all() and torch.equal(part[:, 0], found[0][:, 0]) for part in found)
    return found[0][:, 0].tolist()


def common(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


class Walk:
    """A pool, and what every running sequence should read; admission as a scheduler does it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        page_size = self.rng.choice([1, 3, 4, 16, 40])
        self.pool = cache(self.rng.choice([1, 2, 4, 7]) * -(-40 // page_size) + seed % 3, page_size)
        self.running: dict[int, list[int]] = {}
        self.next_id, self.reused = 0, 0

    def reserved(self, more: int = 0) -> int:
        """Pages as a scheduler counts them: for each sequence its own."""
        return sum(self.pool.pages_of(len(ids)) for ids in self.running.values()) + self.pool.pages_of(more)

    def begin(self) -> None:
        known = [*self.running.values(), *self.pool.prefixes]
        head = list(self.rng.choice(known)) if known and self.rng.random() < 0.8 else []
        head = head[: self.rng.randint(0, len(head))]
        ids = (head + [self.rng.randint(1, 3) for _ in range(self.rng.randint(1, 30))])[:35]
        if self.reserved(len(ids)) > self.pool.num_pages:
            return
        best = max((common(ids[:-1], known) for known in known), default=0)
        length = self.pool.reuse(self.next_id, ids[:-1])
        whole = best // self.pool.page_size * self.pool.page_size
        assert length in ({best, whole} if whole >= MIN_PREFIX else {best, 0} if best >= MIN_PREFIX else {0})
        self.reused += length > 0
        write_ids(self.pool, self.next_id, ids[length:])
        self.running[self.next_id], self.next_id = ids, self.next_id + 1

    def grow(self) -> None:
        if self.running:
            seq = self.rng.choice(list(self.running))
            more = [self.rng.randint(1, 3) for _ in range(self.rng.randint(1, 4))]
            new = self.pool.pages_of(len(self.running[seq]) + len(more)) - self.pool.pages_of(
                len(self.running[seq])
            )
            if len(self.running[seq]) + len(more) <= 40 and self.reserved() + new <= self.pool.num_pages:
                write_ids(self.pool, seq, more)
                self.running[seq] = self.running[seq] + more

    def rollback(self) -> None:
        if self.running:
            seq = self.rng.choice(list(self.running))
            self.running[seq] = self.running[seq][: self.rng.randint(0, len(self.running[seq]))]
            self.pool.rollback(seq, len(self.running[seq]))

    def release(self) -> None:
        if self.running:
            seq = self.rng.choice(list(self.running))
            del self.running[seq]
            self.pool.release(seq, keep=self.rng.random() < 0.8)

    def check(self) -> None:
        pool = self.pool
        pool.check()
        for seq, ids in self.running.items():
            chain = pool.chain(seq)
            assert (chain.token_ids, read(pool, chain.pages, len(ids))) == (ids, [float(i) for i in ids])
        for prefix in pool._prefixes:
            assert read(pool, prefix.pages, prefix.length) == [float(i) for i in prefix.token_ids]
        held = {page for seq in self.running for page in pool.chain(seq).pages}
        assert pool.num_free == pool.num_pages - len(held) >= pool.num_pages - self.reserved()
        for page in (*pool._free, pool.scratch):
            assert not any(t[page * pool.page_size : (page + 1) * pool.page_size].any() for t in pool.keys)


@pytest.mark.parametrize("seed", range(25))
def test_a_random_walk(seed: int) -> None:
    walk = Walk(seed)
    for _ in range(150):
        walk.rng.choice([walk.begin, walk.begin, walk.grow, walk.rollback, walk.release])()
        walk.check()
    for seq in walk.running:
        walk.pool.release(seq)
    assert walk.pool.num_free == walk.pool.num_pages


def test_the_walks_do_reuse() -> None:
    walks = [Walk(seed) for seed in range(20)]
    for walk in walks:
        for _ in range(150):
            walk.rng.choice([walk.begin, walk.begin, walk.grow, walk.rollback, walk.release])()
    assert sum(walk.reused for walk in walks) > 60


def test_whole_pages_are_shared_and_the_rest_is_copied() -> None:
    pool = cache()
    write_ids(pool, 1, IDS)
    assert pool.reuse(2, IDS[:22]) == 22
    left, right = pool.chain(1).pages, pool.chain(2).pages
    assert left[:5] == right[:5]
    assert left[5] != right[5]
    assert pool.num_pages - pool.num_free == 9
    pool.release(1)
    assert read(pool, right, 22) == [float(i) for i in IDS[:22]]
    pool.check()


def test_a_rollback_into_a_shared_page_writes_a_page_of_its_own() -> None:
    pool = cache()
    write_ids(pool, 1, IDS[:20])
    pool.reuse(2, IDS[:20])
    pool.rollback(2, 18)
    write_ids(pool, 2, [9, 9, 9])
    assert read(pool, pool.chain(1).pages, 20) == [float(i) for i in IDS[:20]]
    assert read(pool, pool.chain(2).pages, 21) == [*(float(i) for i in IDS[:18]), 9.0, 9.0, 9.0]
    pool.check()


def test_the_least_recently_used_gives_up_its_pages_from_the_end() -> None:
    pool = cache(num_pages=15)
    prompts = [[first, *IDS[:19]] for first in (11, 12, 13)]
    for seq, ids in enumerate(prompts):
        write_ids(pool, seq, ids)
        pool.release(seq, keep=True)
    assert pool.num_free == 15
    assert pool.reuse(7, prompts[0]) == 20
    write_ids(pool, 8, [5])
    assert pool.prefixes == [prompts[1][:16], prompts[2], prompts[0]]
    write_ids(pool, 9, [5])
    assert pool.prefixes == [prompts[2], prompts[0]], "a prefix that is too short is given up"
    pool.check()


def test_when_nothing_else_is_left_the_beginning_of_a_page_is_not_copied() -> None:
    """Running sequences hold all but the one page that is to be copied."""
    pool = cache(num_pages=6)
    write_ids(pool, 1, IDS[:18])
    pool.release(1, keep=True)
    write_ids(pool, 2, [9])
    assert pool.reuse(3, IDS[:18]) == 16
    write_ids(pool, 3, IDS[16:18])
    assert read(pool, pool.chain(3).pages, 18) == [float(i) for i in IDS[:18]]
    assert (pool.num_free, pool.prefixes) == (0, [])
    pool.check()


def test_a_chain_that_goes_on_from_a_prefix_replaces_it_and_a_shorter_one_is_not_kept() -> None:
    pool = cache(num_pages=14)
    write_ids(pool, 1, IDS[:20])
    pool.release(1, keep=True)
    assert pool.reuse(2, IDS[:20]) == 20
    write_ids(pool, 2, IDS[20:])
    pool.release(2, keep=True)
    assert pool.prefixes == [IDS]
    write_ids(pool, 3, IDS[:20])
    pool.release(3, keep=True)
    assert pool.prefixes == [IDS]
    pool.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("running", [True, False])
def test_what_is_not_finite_is_never_shared(value: float, running: bool) -> None:
    pool = cache()
    write_ids(pool, 1, IDS[:17], poison=value)
    write_ids(pool, 1, IDS[17:20])
    if not running:
        pool.release(1, keep=True)
        assert all(not tensor.any() for tensor in (*pool.keys, *pool.values))
    assert pool.reuse(2, IDS[:20]) == 0
    assert pool.reuse(3, IDS[:16]) == (16 if running else 0), "what stands before it is sound"
    pool.check()


def test_what_is_written_anew_is_looked_at_anew() -> None:
    """A chain that was found finite, was rolled back and is not finite any more."""
    pool = cache(num_pages=40)
    write_ids(pool, 1, IDS)
    assert pool.reuse(2, IDS) == 30
    pool.rollback(1, 20)
    write_ids(pool, 1, [8] * 5, poison=torch.nan)
    assert pool.reuse(3, [*IDS[:20], *[8] * 5]) == 0
    pool.release(2)
    assert pool.reuse(3, IDS) == 20, "the part before it is sound"
    pool.check()


def test_a_prefix_that_many_take_over_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, asked = cache(num_pages=80), []
    write_ids(pool, 1, IDS)
    look = pool._finite
    monkeypatch.setattr(pool, "_finite", lambda pages, length: asked.append(length) or look(pages, length))
    assert [pool.reuse(seq_id, IDS[:29]) for seq_id in range(2, 8)] == [29] * 6
    assert asked == [29]


@pytest.mark.parametrize("length", [MIN_PREFIX - 1, MIN_PREFIX])
def test_a_short_prefix_is_not_worth_it(length: int) -> None:
    pool = cache()
    write_ids(pool, 1, IDS[:length])
    assert pool.reuse(2, IDS) == (length if length >= MIN_PREFIX else 0)
    pool.release(1, keep=True)
    assert pool.prefixes == ([IDS[:length]] if length >= MIN_PREFIX else [])


def test_misuse_trips_an_assertion() -> None:
    pool = cache(num_pages=10)
    write_ids(pool, 1, IDS)
    with pytest.raises(AssertionError, match="passes the longest"):
        pool.reserve(1, 11)
    with pytest.raises(AssertionError, match="rollback to 31 of 30"):
        pool.rollback(1, 31)
    with pytest.raises(AssertionError, match="no free page"):
        pool.reserve(2, 9)
    pool.release(2)
    pool.release(99)
    assert pool.num_free == 2
    pool.check()


@pytest.mark.parametrize("field", ["holders", "free", "pages", "length"])
def test_check_finds(field: str) -> None:
    pool = cache()
    write_ids(pool, 1, IDS)
    if field == "holders":
        pool._holders[pool.chain(1).pages[0]] = 2
    elif field == "free":
        pool._free.append(pool.chain(1).pages[0])
    elif field == "pages":
        pool.chain(1).pages.pop()
    else:
        pool.chain(1).length = 41
    with pytest.raises(AssertionError):
        pool.check()


def test_sizes() -> None:
    pool = cache()
    assert pool.num_bytes() == {"cpu": bytes_per_token(LAYERS, torch.float32) * 13 * 4}
    assert [tuple(tensor.shape) for tensor in pool.keys] == [(52, 2, 4), (52, 1, 8)]

"""Decode steps through static buffers: padded or not, the answer is the body's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ensemble_core.members.attention.base import Pass
from ensemble_core.members.attention.pages import by_gathering, pack_pages
from ensemble_core.members.body.graphs import GraphedBody, bucket_sizes, eagerly
from ensemble_core.members.cache.base import LayerShape
from ensemble_core.members.cache.pages import PagedCache

CPU = torch.device("cpu")
HEADS, SIZE, VOCABULARY = 2, 4, 11


class ToyBody:
    """One layer over random tables; it notes how it is called."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.embedding: nn.Module = nn.Embedding(VOCABULARY, HEADS * SIZE)
        self.head = torch.randn(HEADS * SIZE, VOCABULARY)
        self.calls: list[int] = []

    @torch.no_grad()
    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        self.calls.append(len(token_ids))
        x = self.embedding(token_ids) + run.positions.unsqueeze(1).sin()
        x = x.view(-1, HEADS, SIZE)
        out = run.attend(0, x, x * 2, x.flip(2), None, 6)
        return out.flatten(1)[wanted] @ self.head

    def num_bytes(self) -> dict[str, int]:
        return {"cpu": 7}


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 4, 8]),
        (17, [1, 2, 4, 8, 16, 24]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
        (33, [1, 2, 4, 8, 16, 24, 32, 48]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
    ],
)
def test_buckets(max_batch: int, sizes: list[int]) -> None:
    assert bucket_sizes(max_batch) == sizes


def test_buckets_hold_every_batch_and_waste_at_most_half() -> None:
    for max_batch in range(1, 200):
        sizes = bucket_sizes(max_batch)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] >= max_batch > (sizes[-2] if len(sizes) > 1 else 0)
        assert all(after <= 2 * before for before, after in pairwise(sizes))


class Bench:
    """Two equal caches, one behind the body and one behind the graphs."""

    def __init__(self, sizes: list[int]) -> None:
        self.caches = [PagedCache([LayerShape(HEADS, SIZE, CPU)], 40, 4, 20, torch.float32) for _ in range(2)]
        self.body = ToyBody()
        self.captured: list[Callable[[], Tensor]] = []
        self.graphed = GraphedBody(self.body, self.caches[1], by_gathering, CPU, sizes, self._capture)
        self.body.calls.clear()

    def _capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compute()
        self.captured.append(compute)
        return eagerly(compute)

    def feed(self, ids: dict[int, list[int]], wanted: list[int]) -> list[Tensor]:
        found = []
        for cache, body in zip(self.caches, (self.body, self.graphed), strict=True):
            counts = [len(part) for part in ids.values()]
            chains = [cache.reserve(seq, len(part)) for seq, part in ids.items()]
            run, order = pack_pages(cache, chains, counts, by_gathering)
            parts = list(ids.values())
            tokens = torch.tensor([token for i in order for token in parts[i]])
            found.append(body(run, tokens, torch.tensor(wanted)).clone())
            for seq, part in ids.items():
                cache.advance(seq, part)
        return found


@pytest.mark.parametrize("seed", range(5))
def test_padded_steps_are_the_bodys_own(seed: int) -> None:
    rng, bench = random.Random(seed), Bench([1, 4, 8])
    token = lambda: rng.randrange(VOCABULARY)  # noqa: E731
    for seq in range(10):
        bench.feed({seq: [token() for _ in range(rng.randint(1, 12))]}, [0])
    for _ in range(7):
        seqs = rng.sample(range(10), rng.randint(1, 10))
        wanted = rng.choice([list(range(len(seqs))), rng.sample(range(len(seqs)), rng.randint(1, len(seqs)))])
        own, found = bench.feed({seq: [token()] for seq in seqs}, wanted)
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)
    left, right = bench.caches
    scratch = left.scratch * left.page_size
    for ours, theirs in zip((*left.keys, *left.values), (*right.keys, *right.values), strict=True):
        torch.testing.assert_close(ours[:scratch], theirs[:scratch], atol=1e-5, rtol=1e-4)
        assert not ours[scratch:].any()


def test_a_step_takes_the_smallest_bucket_and_what_is_no_decode_step_takes_none() -> None:
    bench = Bench([1, 4])
    bench.feed({seq: [1, 2, 3] for seq in range(6)}, [0])
    bench.body.calls.clear()
    for num in (1, 2, 4, 5):
        bench.feed({seq: [4] for seq in range(num)}, list(range(num)))
    bench.feed({0: [1], 1: [2, 3]}, [0])
    assert bench.body.calls == [1, 1, 2, 4, 4, 4, 5, 5, 3, 3]
    assert len(bench.captured) == 2


def test_a_graph_reads_nothing_but_its_buffers() -> None:
    """The same computation, called again, gives what the last fill says."""
    bench = Bench([4])
    bench.feed({seq: [seq, 2, 3] for seq in range(4)}, [0])
    own, _ = bench.feed({seq: [seq + 4] for seq in range(4)}, [0, 1, 2, 3])
    torch.testing.assert_close(bench.captured[0](), own, atol=1e-5, rtol=1e-4)


def test_it_is_a_body() -> None:
    bench = Bench([1])
    assert bench.graphed.embedding is bench.body.embedding
    assert bench.graphed.num_bytes() == {"cpu": 7}
    assert bench.graphed.sizes == [1]

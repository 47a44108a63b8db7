"""Decode steps as captured graphs: one graph for each size of batch that is served, others padded up to the next.

A decode step launches thousands of small kernels, which at a small batch takes longer than running them. A pass with
one new token a sequence has the same shape at every step, so that it can be captured once and replayed: what changes
lies in static buffers (`DecodeBuffers`) that are filled before a replay. Rows that pad a batch are a token of their
own in the scratch page of the cache and see nothing else.

`GraphedBody` is a body around a body; passes that are no decode step, or larger than any bucket, go through it
unchanged. How a graph is captured is given (`Capture`): `cuda_graphs` on CUDA; `eagerly`, which calls the function,
where buckets and padding are to be proved without a device. Does not know feeds, candidates or sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensemble_core.members.attention.base import Pass
from ensemble_core.members.attention.pages import Attention, Blocks, PagedPass
from ensemble_core.members.body.base import Body
from ensemble_core.members.cache.pages import PagedCache

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]  # a static computation -> what computes it again

_WARM_UP = 2  # runs before a capture: libraries make their plans and workspaces


def bucket_sizes(max_batch: int) -> list[int]:
    """Batches that get a graph: powers of two and, from 16, what lies half-way; the last one holds `max_batch`."""
    sizes, size = [1], 1
    while size < max_batch:
        sizes += [size * 3 // 2] if size >= 16 else []
        size *= 2
        sizes.append(size)
    return [s for i, s in enumerate(sizes) if i == 0 or sizes[i - 1] < max_batch]


def eagerly(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """No graph: computed anew each time."""
    return compute


def cuda_graphs(device: torch.device) -> Capture:
    """Captures on a device, each after a warm-up on a stream of its own.

    All graphs share their memory, so the result of a replay is valid until any of them is replayed.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return capture


class DecodeBuffers:
    """The inputs of a decode step of `size` sequences, at addresses that never change."""

    def __init__(self, size: int, cache: PagedCache, device: torch.device) -> None:
        self.size, self._cache = size, cache
        self._width = cache.pages_of(cache.max_len)
        self._longs = torch.zeros(3, size, dtype=torch.long, device=device)
        self._ints = torch.zeros(size * (2 + self._width) + 1, dtype=torch.int32, device=device)
        self.places = torch.arange(size, device=device)
        self.token_ids, self.positions, slots = self._longs.unbind()
        used, ends, tables = torch.split(self._ints, [size, size + 1, size * self._width])
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.blocks = Blocks(
            slots, starts, used, ends, tables.view(size, self._width), cache.page_size, counts=(1,) * size
        )

    def fill(self, run: PagedPass, token_ids: Tensor) -> None:
        """Take in a decode step of at most `size` sequences; the rest is padding. Two copies to the device."""
        given, num, scratch = run.blocks, len(token_ids), self._cache.scratch
        longs = torch.zeros(3, self.size, dtype=torch.long)
        longs[2] = scratch * self._cache.page_size
        longs[:, :num] = torch.stack((token_ids, run.positions, given.slots))
        used = torch.ones(self.size, dtype=torch.int32)
        used[:num] = given.used
        ends = torch.nn.functional.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        tables = torch.full((self.size, self._width), scratch, dtype=torch.int32)
        tables[:num] = given.tables[:, :1]  # what pads a table is the sequence's own first page
        tables[:num, : given.tables.shape[1]] = given.tables
        self._longs.copy_(longs)
        self._ints.copy_(torch.cat((used, ends, tables.flatten())))


@dataclass(frozen=True, slots=True)
class _Graph:
    buffers: DecodeBuffers
    replay: Callable[[], Tensor]


class GraphedBody:
    """A body whose decode steps are replayed; see `base.Body`."""

    def __init__(
        self,
        body: Body,
        cache: PagedCache,
        attention: Attention,
        device: torch.device,
        sizes: Sequence[int],
        capture: Capture,
    ) -> None:
        """Captures a graph for each of `sizes`. Raises what the body or the capture raises."""
        self._body, self._sizes = body, sorted(sizes)
        self._graphs: dict[int, _Graph] = {}
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            buffers = DecodeBuffers(size, cache, device)
            run = PagedPass(cache, buffers.positions, buffers.blocks, attention)
            buffers.fill(_nobody(cache, attention), torch.empty(0, dtype=torch.long))
            self._graphs[size] = _Graph(buffers, capture(_step(body, run, buffers)))

    @property
    def embedding(self) -> nn.Module:
        """See `base.Body`."""
        return self._body.embedding

    @property
    def sizes(self) -> list[int]:
        """Batches that have a graph."""
        return list(self._sizes)

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """See `base.Body`; what comes back is valid until the next call."""
        num = len(token_ids)
        if not isinstance(run, PagedPass) or num > self._sizes[-1] or len(run.blocks.counts) < num:
            return self._body(run, token_ids, wanted)
        graph = self._graphs[self._sizes[bisect_left(self._sizes, num)]]
        graph.buffers.fill(run, token_ids)
        logits = graph.replay()
        everybody = len(wanted) == num and bool((wanted == torch.arange(num)).all())
        return logits[:num] if everybody else logits[wanted.to(logits.device)]

    def num_bytes(self) -> dict[str, int]:
        """See `base.Body`; buffers and what a graph keeps are not weights."""
        return self._body.num_bytes()


def _step(body: Body, run: PagedPass, buffers: DecodeBuffers) -> Callable[[], Tensor]:
    return lambda: body(run, buffers.token_ids, buffers.places)


def _nobody(cache: PagedCache, attention: Attention) -> PagedPass:
    """A pass without a sequence: all of a bucket is padding."""
    none = torch.empty(0, dtype=torch.long)
    blocks = Blocks(none, none, none, none, torch.empty(0, 1, dtype=torch.int32), cache.page_size, counts=())
    return PagedPass(cache, none, blocks, attention)

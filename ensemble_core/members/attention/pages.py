"""Attention over pages: all sequences' new tokens in one row, keys and values found through tables of pages.

Two ways with one answer. `by_kernel` is torch's variable-length attention, which reads pages in place: CUDA, float16
or bfloat16, heads of up to 256 in multiples of 8, pages in multiples of 256 tokens (`kernel_serves`). `by_gathering`
copies each sequence's pages side by side and is plain torch: it serves every device, dtype and shape, can be captured
in a CUDA graph where every sequence has one new token, and is what the kernel is proved against.

Sequences stand in the order of how many new tokens they have. Invariant: a token attends to what its own sequence
has cached up to and including itself, within the layer's window, and to nothing else. Does not know tokens, logits
or models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ensemble_core.members.attention.base import folded_attention
from ensemble_core.members.cache.base import LayerShape
from ensemble_core.members.cache.pages import Chain, PagedCache

logger = logging.getLogger(__name__)

KERNEL_PAGE = 256  # tokens; flash attention takes multiples of it
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD = 256
_AGREED = 0.03  # of outputs of about 1, in bfloat16


@dataclass(frozen=True, slots=True)
class Blocks:
    """Where the B sequences of a pass read and write, on one device.

    counts, lengths: new tokens and all tokens of each, for those who may ask on the host; a captured pass has one
    new token a sequence, and says no lengths.
    """

    slots: Tensor  # (N,) int64, where each new token goes
    starts: Tensor  # (B + 1,) int32, where each sequence's new tokens begin in the pass
    used: Tensor  # (B,) int32, tokens of each sequence, the new ones included
    ends: Tensor  # (B + 1,) int32, sums of `used`
    tables: Tensor  # (B, W) int32, pages; padded with the sequence's own first
    page_size: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Blocks:
        """The same on `device`."""
        return replace(
            self,
            slots=self.slots.to(device),
            starts=self.starts.to(device),
            used=self.used.to(device),
            ends=self.ends.to(device),
            tables=self.tables.to(device),
        )

    @property
    def longest(self) -> int:
        """An upper bound of `used`."""
        return self.tables.shape[1] * self.page_size


Attention = Callable[[Tensor, Tensor, Tensor, Blocks, float | None, int | None], Tensor]


@dataclass(slots=True)
class PagedPass:
    """One forward over a paged cache; `base.Pass`."""

    cache: PagedCache
    positions: Tensor  # (N,) int64
    blocks: Blocks
    attention: Attention
    _blocks_on: dict[torch.device, Blocks] = field(default_factory=dict)

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
        keys, values, blocks = self.cache.keys[layer], self.cache.values[layer], self.blocks_on(query.device)
        keys.index_copy_(0, blocks.slots, key)
        values.index_copy_(0, blocks.slots, value)
        out = self.attention(query, keys, values, blocks, scaling, window)
        return out if at is None else out[at.to(out.device)]

    def blocks_on(self, device: torch.device) -> Blocks:
        """The blocks on a layer's device."""
        if device not in self._blocks_on:
            self._blocks_on[device] = self.blocks.to(device)
        return self._blocks_on[device]


def pack_pages(
    cache: PagedCache, chains: Sequence[Chain], counts: Sequence[int], attention: Attention
) -> tuple[PagedPass, list[int]]:
    """Order the sequences of a forward; their chains hold the pages of their new tokens already.

    Returns the pass and the order: position in the pass -> index in `chains`.
    """
    order = sorted(range(len(chains)), key=lambda i: counts[i])
    positions = [range(chains[i].length, chains[i].length + counts[i]) for i in order]
    slots = [_slots(cache, chains[i].pages, places) for i, places in zip(order, positions, strict=True)]
    lengths = tuple(chains[i].length + counts[i] for i in order)
    sorted_counts = tuple(counts[i] for i in order)
    width = cache.pages_of(max(lengths))
    blocks = Blocks(
        slots=torch.tensor([slot for part in slots for slot in part]),
        starts=_sums(sorted_counts),
        used=torch.tensor(lengths, dtype=torch.int32),
        ends=_sums(lengths),
        tables=torch.tensor([padded(chains[i].pages, width) for i in order], dtype=torch.int32),
        page_size=cache.page_size,
        counts=sorted_counts,
        lengths=lengths,
    )
    return PagedPass(cache, torch.tensor([p for part in positions for p in part]), blocks, attention), order


def padded(pages: Sequence[int], width: int) -> list[int]:
    """A row of a table; what pads it is read and masked, so it must be the sequence's own."""
    return [*pages[:width], *[pages[0]] * (width - len(pages))]


def kernel_serves(layers: Sequence[LayerShape], dtype: torch.dtype, page_size: int) -> bool:
    """Whether `by_kernel` can be tried: what flash attention says that it takes."""
    heads = [layer.head_size for layer in layers]
    return (
        all(layer.device.type == "cuda" for layer in layers)
        and dtype in _KERNEL_DTYPES
        and all(size <= _MAX_HEAD and size % 8 == 0 for size in heads)
        and page_size % KERNEL_PAGE == 0
    )


def by_kernel(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scaling: float | None, window: int | None
) -> Tensor:
    """(N, H, D) queries over a layer's pool, through torch's variable-length attention.

    One split of the keys: with more, paged attention of flash attention 2 can leave rows unwritten (pytorch issue
    194167), and one makes a sequence's numbers independent of the others in the pass.
    """
    paged = (-1, blocks.page_size, *keys.shape[1:])
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        query.contiguous(),
        keys.view(paged),
        values.view(paged),
        blocks.starts,
        blocks.ends,
        max(blocks.counts),
        blocks.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=blocks.used,
        block_table=blocks.tables,
        num_splits=1,
    )
    return out


def choose_attention(name: str, layers: Sequence[LayerShape], dtype: torch.dtype, page_size: int) -> Attention:
    """The kernel where it serves and agrees with the plain way on this very machine, else the plain way."""
    if not kernel_serves(layers, dtype, page_size):
        return by_gathering
    try:
        difference = max(disagreement(by_kernel, layer, dtype, page_size) for layer in dict.fromkeys(layers))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        logger.warning("%s: pages are copied at every step, the attention kernel fails: %s", name, error)
        return by_gathering
    if not difference <= _AGREED:
        logger.warning("%s: pages are copied at every step, the attention kernel differs by %g", name, difference)
        return by_gathering
    return by_kernel


def disagreement(attention: Attention, layer: LayerShape, dtype: torch.dtype, page_size: int) -> float:
    """The largest difference between an attention and `by_gathering` on random numbers, with windows and without.

    Five sequences: one new token and several, within a page and over pages whose order is not that of the pool.
    """
    cache = PagedCache([layer], 13, page_size, 4 * page_size, dtype)
    generator = torch.Generator().manual_seed(0)
    for pool in (*cache.keys, *cache.values):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    lengths, counts = (3, page_size, 2 * page_size + 7, page_size + 5, 3 * page_size - 1), (1, 1, 1, 9, 20)
    pages = torch.randperm(13, generator=generator).tolist()
    chains = []
    for length, count in zip(lengths, counts, strict=True):
        chain = Chain([pages.pop() for _ in range(cache.pages_of(length))], max(length - count, 0))
        chains.append(chain)
    run, _ = pack_pages(cache, chains, counts, attention)
    blocks = run.blocks_on(layer.device)
    query = torch.randn(sum(counts), 2 * layer.num_kv_heads, layer.head_size, generator=generator)
    query = query.to(layer.device, dtype)
    worst = 0.0
    for window in (None, 5, page_size + 3):
        found, plain = (
            one(query, cache.keys[0], cache.values[0], blocks, None, window) for one in (attention, by_gathering)
        )
        worst = max(worst, (found.float() - plain.float()).abs().nan_to_num(torch.inf).max().item())
    return worst


def by_gathering(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scaling: float | None, window: int | None
) -> Tensor:
    """(N, H, D) queries over a layer's pool, by copies of the pages: sequences with one new token at once."""
    size, counts = blocks.page_size, blocks.counts
    singles = sum(count == 1 for count in counts)
    groups = [(0, singles, 1, blocks.tables.shape[1])] if singles else []  # sequences, new tokens, pages
    groups += [(i, i + 1, counts[i], -(-blocks.lengths[i] // size)) for i in range(singles, len(counts))]
    parts, start = [], 0
    for first, last, new, width in groups:
        stop, tables = start + (last - first) * new, blocks.tables[first:last, :width]
        mask = _mask(blocks.used[first:last], new, width * size, window, query.dtype)
        cached = gathered(keys, tables, size), gathered(values, tables, size)
        parts.append(folded_attention(query[start:stop], cached[0], cached[1], mask, scaling))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gathered(pool: Tensor, tables: Tensor, page_size: int) -> Tensor:
    """(B, Hkv, W * page_size, D): each sequence's pages side by side, copied."""
    pages = pool.view(-1, page_size, *pool.shape[1:]).index_select(0, tables.flatten())
    return pages.view(tables.shape[0], -1, *pool.shape[1:]).transpose(1, 2)


def _mask(used: Tensor, num_new: int, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, L), added to scores: 0 where a new token sees a place, else -inf."""
    at = used.view(-1, 1, 1, 1) - num_new + torch.arange(num_new, device=used.device).view(1, 1, -1, 1)
    places = torch.arange(length, device=used.device)
    seen = places <= at
    if window is not None:
        seen &= places > at - window
    return torch.zeros(seen.shape, dtype=dtype, device=used.device).masked_fill_(~seen, -torch.inf)


def _slots(cache: PagedCache, pages: Sequence[int], places: range) -> list[int]:
    size = cache.page_size
    return [pages[place // size] * size + place % size for place in places]


def _sums(counts: Sequence[int]) -> Tensor:
    """(B + 1,) int32: 0 and the running sums."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)

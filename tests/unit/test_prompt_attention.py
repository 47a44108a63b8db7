"""Attention of chunks of prompts in tiles of bf16 products, against plain attention in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ensemble_core.members.attention.rows import FEW, pack
from ensemble_core.members.cache.base import LayerShape
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.kernels.base import Chunk
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.kernels.compiled.prompts import attend_chunk, serves
from ensemble_core.members.kernels.compiled.tiles import can_multiply

CPU = torch.device("cpu")
SLOTS, FIRST = 1500, 70
needs_instruction = pytest.mark.skipif(
    not can_multiply(), reason="this processor has neither AVX512-BF16 nor AVX2"
)


def inputs(heads: int, kv_heads: int, size: int, num: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * size + num)
    shapes = [(num, heads, size), (SLOTS, kv_heads, size), (SLOTS, kv_heads, size)]
    query, keys, values = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return query, keys, values


def plain(query: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, window: int | None, scaling: float) -> Tensor:
    fold, stop = query.shape[1] // keys.shape[1], chunk.start + len(query)
    seen = slice(chunk.first_slot, chunk.first_slot + stop)
    at, key = torch.arange(chunk.start, stop).unsqueeze(1), torch.arange(stop)
    hidden = (key > at) | (key <= at - (window or stop))
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ keys[seen, head // fold].double().t() * scaling
        shares = scores.masked_fill(hidden, -torch.inf).softmax(1)
        heads.append(shares @ values[seen, head // fold].double())
    return torch.stack(heads, dim=1)


@needs_instruction
@pytest.mark.parametrize(
    ("start", "num"), [(0, 1), (0, 20), (0, 256), (37, 100), (300, 300), (1000, 17), (255, 513)]
)
@pytest.mark.parametrize("window", [None, 1, 100, 512])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 64), (4, 1, 256), (5, 1, 128), (2, 2, 64), (49, 1, 64)]
)
def test_it_is_softmax_attention(
    heads: int, kv_heads: int, size: int, window: int | None, start: int, num: int
) -> None:
    parts, chunk = inputs(heads, kv_heads, size, num), Chunk(FIRST, start)
    found = attend_chunk(*parts, chunk, window, 0.1)
    assert (found.dtype, found.shape) == (torch.bfloat16, parts[0].shape)
    torch.testing.assert_close(found.double(), plain(*parts, chunk, window, 0.1), atol=2e-2, rtol=2e-2)


@needs_instruction
@pytest.mark.parametrize("window", [None, 130])
def test_where_a_prompt_is_cut_changes_no_bit(window: int | None) -> None:
    query, keys, values = inputs(9, 3, 64, 600)
    whole = attend_chunk(query, keys, values, Chunk(FIRST, 0), window, None)
    for cuts in ([1, 2, 300], [17, 255, 256, 257], [599]):
        edges = [0, *cuts, 600]
        parts = [attend_chunk(query[a:b], keys, values, Chunk(FIRST, a), window, None) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole)


@needs_instruction
def test_how_many_threads_there_are_changes_no_bit() -> None:
    parts, before = inputs(4, 1, 256, 300), torch.get_num_threads()
    found = []
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            found.append(attend_chunk(*parts, Chunk(FIRST, 200), None, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_instruction
def test_nothing_outside_is_read_and_nothing_inside_is_hidden() -> None:
    query, keys, values = inputs(4, 2, 64, 150)
    chunk = Chunk(FIRST, 150)
    expected = attend_chunk(query, keys, values, chunk, 100, None)
    for pool in (keys, values):
        pool[:FIRST], pool[FIRST + 300 :] = torch.nan, torch.inf
        pool[FIRST : FIRST + 20] = 100.0  # in its row, but in front of every window
    assert torch.equal(attend_chunk(query, keys, values, chunk, 100, None), expected)
    for pool in (keys, values):
        kept = pool[FIRST + 299].clone()
        pool[FIRST + 299] = torch.nan
        assert attend_chunk(query, keys, values, chunk, 100, None)[-1].isnan().all()
        pool[FIRST + 299] = kept


@needs_instruction
def test_scores_that_are_far_apart_stay_finite() -> None:
    parts = inputs(4, 2, 64, 200)
    torch.testing.assert_close(
        attend_chunk(*parts, Chunk(FIRST, 0), None, 40.0).double(),
        plain(*parts, Chunk(FIRST, 0), None, 40.0),
        atol=2e-2,
        rtol=2e-2,
    )


def test_it_is_for_bfloat16_and_heads_of_whole_tiles_alone() -> None:
    assert serves(torch.bfloat16, {64, 256}) == can_multiply()
    assert not serves(torch.bfloat16, {64, 80})
    assert not serves(torch.float32, {64})
    assert choose([CPU], torch.float16).chunk_attention(torch.float16, {64}) is None


@needs_instruction
@pytest.mark.parametrize("window", [None, 90])
def test_a_pass_gives_each_token_the_attention_that_fits_its_chunk(window: int | None) -> None:
    """Few new tokens by spans, more by chunks, and only some places asked for: the same answers."""
    cache = KVCache([LayerShape(1, 64, CPU)], 4, 400, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    for pool in (*cache.keys, *cache.values):
        pool.copy_(torch.randn(pool.shape, generator=generator))
    counts, starts = [1, 200, FEW, 50], [300, 100, 20, 0]
    rows = [cache.row(seq) for seq in range(4)]
    for row, start in zip(rows, starts, strict=True):
        row.length = start
    kernels = choose([CPU], torch.bfloat16)
    run, order = pack(
        cache, rows, counts, kernels.attend_spans, FEW, kernels.chunk_attention(torch.bfloat16, {64})
    )
    assert [chunk.start for *_, chunk in run.chunks] == [0, 100]
    assert not run.groups
    num = sum(counts)
    query, key, value = (torch.randn(num, h, 64, generator=generator).bfloat16() for h in (2, 1, 1))
    out = run.attend(0, query, key, value, 0.1, window)
    begin = 0
    for i in order:
        own = slice(begin, begin + counts[i])
        chunk = Chunk(400 * i, starts[i])
        expected = plain(query[own], cache.keys[0], cache.values[0], chunk, window, 0.1)
        torch.testing.assert_close(out[own].double(), expected, atol=2e-2, rtol=2e-2)
        begin = own.stop
    at = torch.tensor([num - 1, 0, 66, 66])
    some = run.attend(0, query, key, value, 0.1, window, at)
    torch.testing.assert_close(some.double(), out[at].double(), atol=2e-2, rtol=2e-2)

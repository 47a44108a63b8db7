"""Packed attention against one plain softmax per token and head."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_core.errors import UnsupportedModelError
from ensemble_core.members.attention.base import packed_attention
from ensemble_core.members.attention.rows import FEW, pack
from ensemble_core.members.cache.base import LayerShape
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.kernels import choice, compiled
from ensemble_core.members.kernels.base import SpanAttention
from ensemble_core.members.kernels.choice import choose

ROW_LEN, KV_HEADS, SIZE = 96, 2, 8
CPU = torch.device("cpu")


def filled_cache(num_rows: int, seed: int) -> KVCache:
    """A pool full of numbers, stale ones beyond each row's length included."""
    cache = KVCache([LayerShape(KV_HEADS, SIZE, torch.device("cpu"))], num_rows, ROW_LEN, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def plain(query: Tensor, cache: KVCache, row: int, position: int, window: int | None, scale: float) -> Tensor:
    """(H, D): one token's attention, head by head."""
    begin = 0 if window is None else max(0, position - window + 1)
    seen = slice(row * ROW_LEN + begin, row * ROW_LEN + position + 1)
    fold = query.shape[0] // KV_HEADS
    heads = []
    for head, q in enumerate(query.double()):
        keys = cache.keys[0][seen, head // fold].double()
        values = cache.values[0][seen, head // fold].double()
        heads.append(torch.softmax(keys @ q * scale, dim=0) @ values)
    return torch.stack(heads)


def run(
    cache: KVCache,
    seqs: list[int],
    counts: list[int],
    heads: int,
    window: int | None,
    seed: int,
    by_spans: SpanAttention | None,
) -> Any:
    """Feed random tokens; returns their order, queries and output, and the pass."""
    rows = [cache.row(seq) for seq in seqs]
    packed, order = pack(cache, rows, counts, by_spans)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, h, sum(counts), SIZE, generator=generator) for h in (heads, KV_HEADS, KV_HEADS)
    )
    module: Any = SimpleNamespace(layer_idx=0)
    out, _ = packed_attention(
        module, query, key, value, None, scaling=0.3, sliding_window=window, unisono=packed, dropout=0.0
    )
    return SimpleNamespace(packed=packed, order=order, query=query, key=key, value=value, out=out)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_rows_and_counts(seed: int, heads: int, window: int | None, compiled: bool) -> None:
    rng = random.Random(seed)
    cache = filled_cache(9, seed)
    for seq in range(9):
        cache.row(seq).length = rng.choice([0, 1, 4, rng.randint(0, 80)])
    seqs = rng.sample(range(9), rng.randint(1, 9))
    counts = [rng.choice([1, 1, 1, 3, rng.randint(1, FEW), rng.randint(FEW, ROW_LEN)]) for _ in seqs]
    counts = [min(count, ROW_LEN - cache.row(seq).length) for seq, count in zip(seqs, counts, strict=True)]
    by_spans = choose([CPU], torch.float32).attend_spans if compiled else None
    done = run(cache, seqs, counts, heads, window, seed, by_spans)
    assert done.packed.num_few == sum(count for count in counts if compiled and count <= FEW)
    assert sorted(done.order) == list(range(len(seqs)))
    place = 0
    for i in done.order:
        row = cache.row(seqs[i])
        for offset in range(counts[i]):
            position = row.length + offset
            slot = row.index * ROW_LEN + position
            assert torch.equal(cache.keys[0][slot], done.key[0, :, place])
            assert torch.equal(cache.values[0][slot], done.value[0, :, place])
            place += 1
    place = 0
    for i in done.order:
        row = cache.row(seqs[i])
        for offset in range(counts[i]):
            expected = plain(done.query[0, :, place], cache, row.index, row.length + offset, window, 0.3)
            torch.testing.assert_close(done.out[0, place].double(), expected, atol=1e-5, rtol=1e-4)
            place += 1
    assert done.out.shape == (1, sum(counts), heads, SIZE)


def test_compiled_attention_is_for_cpu_and_known_types_alone() -> None:
    assert choose([CPU], torch.bfloat16).attend_spans is not None
    assert choose([CPU], torch.float16).attend_spans is None
    assert choose([CPU, torch.device("meta")], torch.float32).attend_spans is None


def test_without_numba_decoding_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "can_compile", choice.can_compile.__wrapped__)  # not what an earlier test found
    monkeypatch.delattr(compiled, "base", raising=False)
    monkeypatch.setitem(sys.modules, "ensemble_core.members.kernels.compiled.base", None)
    assert choose([CPU], torch.float32).attend_spans is None
    assert "unisono[cpu]" in caplog.text


def groups(lengths: dict[int, int], counts: dict[int, int]) -> list[tuple[int, int, int]]:
    """(first row, rows, new tokens) of each group; sequence n lies in row n."""
    cache = filled_cache(8, 0)
    rows = [cache.row(seq) for seq in range(8)]
    for seq, length in lengths.items():
        rows[seq].length = length
    packed, _ = pack(cache, [rows[seq] for seq in counts], list(counts.values()))
    return [(group.first_row, group.num_rows, group.num_new) for group in packed.groups]


def test_neighbours_of_one_count_share_a_group() -> None:
    assert groups({}, dict.fromkeys([2, 0, 1, 3], 1)) == [(0, 4, 1)]


def test_a_gap_or_another_count_splits_a_group() -> None:
    assert groups({}, {0: 1, 1: 1, 3: 1, 4: 2, 5: 1}) == [(0, 2, 1), (3, 1, 1), (5, 1, 1), (4, 1, 2)]


def test_a_much_longer_row_gets_a_group_of_its_own() -> None:
    cache = KVCache([LayerShape(1, 1, torch.device("cpu"))], 3, 1000, torch.float32)
    rows = [cache.row(seq) for seq in range(3)]
    rows[0].length, rows[1].length, rows[2].length = 10, 60, 900
    packed, _ = pack(cache, rows, [1, 1, 1])
    assert [(group.first_row, group.num_rows) for group in packed.groups] == [(0, 2), (2, 1)]


def test_a_group_reads_no_further_back_than_its_window() -> None:
    cache = filled_cache(2, 0)
    for seq, length in ((0, 50), (1, 60)):
        cache.row(seq).length = length
    packed, _ = pack(cache, [cache.row(0), cache.row(1)], [1, 1])
    (window,) = packed.windows(8, torch.device("cpu"))
    assert (window.begin, window.end) == (43, 61)
    assert packed.windows(8, torch.device("cpu"))[0] is window


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias"])
def test_an_unknown_keyword_is_refused_by_name(keyword: str) -> None:
    cache = filled_cache(1, 0)
    packed, _ = pack(cache, [cache.row(0)], [1])
    query, module = torch.ones(1, 2, 1, SIZE), SimpleNamespace(layer_idx=0)
    arguments: Any = {"unisono": packed, keyword: 50.0}
    with pytest.raises(UnsupportedModelError, match=keyword):
        packed_attention(module, query, query, query, None, **arguments)  # type: ignore[arg-type]
    arguments[keyword] = None
    packed_attention(module, query, query, query, None, **arguments)  # type: ignore[arg-type]

"""Attention over pages against the rows' attention, on the same tokens; and the choice of the kernel."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_core.members.attention import pages as paged_attention
from ensemble_core.members.attention.pages import (
    Blocks,
    by_gathering,
    by_kernel,
    choose_attention,
    disagreement,
    kernel_serves,
    pack_pages,
)
from ensemble_core.members.attention.rows import pack
from ensemble_core.members.cache.base import LayerShape
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.cache.rows import KVCache

CPU = torch.device("cpu")
KV_HEADS, SIZE, MAX_LEN = 2, 8, 96
LAYER = LayerShape(KV_HEADS, SIZE, CPU)


def feed(
    caches: tuple[KVCache, PagedCache], seqs: list[int], counts: list[int], window: int | None, seed: int
) -> Any:
    """The same random tokens through rows and through pages: outputs by sequence, and both passes' positions."""
    rows, pages = caches
    generator = torch.Generator().manual_seed(seed)
    parts = {
        seq: [torch.randn(count, heads, SIZE, generator=generator) for heads in (6, KV_HEADS, KV_HEADS)]
        for seq, count in zip(seqs, counts, strict=True)
    }
    packed = [
        pack(rows, [rows.reserve(seq, n) for seq, n in zip(seqs, counts, strict=True)], counts),
        pack_pages(pages, [pages.reserve(s, n) for s, n in zip(seqs, counts, strict=True)], counts, by_gathering),
    ]
    found = []
    for run, order in packed:
        query, key, value = (torch.cat([parts[seqs[i]][kind] for i in order]) for kind in range(3))
        out = run.attend(0, query, key, value, 0.3, window).split([counts[i] for i in order])
        places = run.positions.split([counts[i] for i in order])
        found.append({seqs[i]: (one, at.tolist()) for i, one, at in zip(order, out, places, strict=True)})
    for seq, count in zip(seqs, counts, strict=True):
        rows.advance(seq, [1] * count)
        pages.advance(seq, [1] * count)
    return found


@pytest.mark.parametrize("window", [None, 1, 5, 200])
@pytest.mark.parametrize("page_size", [1, 4, 16, 96])
@pytest.mark.parametrize("seed", range(4))
def test_pages_are_rows(seed: int, page_size: int, window: int | None) -> None:
    """Prefill in chunks, decode and rollback, mixed in any way."""
    rng = random.Random(seed)
    caches = (
        KVCache([LAYER], 6, MAX_LEN, torch.float32),
        PagedCache([LAYER], 6 * -(-MAX_LEN // page_size), page_size, MAX_LEN, torch.float32),
    )
    for turn in range(8):
        seqs = rng.sample(range(6), rng.randint(1, 6))
        counts = [rng.choice([1, 1, 1, 3, rng.randint(1, 11)]) for _ in seqs]
        rows, pages = feed(caches, seqs, counts, window, 100 * seed + turn)
        for seq in seqs:
            assert rows[seq][1] == pages[seq][1]
            torch.testing.assert_close(pages[seq][0], rows[seq][0], atol=1e-5, rtol=1e-4)
        victim = rng.choice(seqs)
        kept = rng.randint(0, caches[0].length(victim))
        for cache in caches:
            cache.rollback(victim, kept)
    caches[1].check()


def test_what_lies_behind_the_end_is_not_seen() -> None:
    """Stale numbers of a chain's own last page, and whatever pads a table."""
    cache = PagedCache([LAYER], 8, 4, 32, torch.float32)
    for seq, count in ((1, 9), (2, 2)):
        cache.reserve(seq, count)
        cache.advance(seq, [1] * count)
    chains = [cache.reserve(seq, 1) for seq in (1, 2)]
    run, _ = pack_pages(cache, chains, [1, 1], by_gathering)
    query, new = torch.ones(2, 4, SIZE), torch.zeros(2, KV_HEADS, SIZE)
    before = run.attend(0, query, new, new, None, None).clone()
    for chain in chains:
        beyond = chain.pages[-1] * 4 + (chain.length + 1) % 4
        for tensor in (*cache.keys, *cache.values):
            tensor[beyond : chain.pages[-1] * 4 + 4] = 1e6
    assert torch.equal(run.attend(0, query, new, new, None, None), before)


@pytest.mark.parametrize(
    ("device", "dtype", "head", "page", "serves"),
    [
        ("cuda", torch.bfloat16, 128, 256, True),
        ("cuda", torch.float16, 256, 512, True),
        ("cuda", torch.float32, 128, 256, False),
        ("cuda", torch.bfloat16, 264, 256, False),
        ("cuda", torch.bfloat16, 60, 256, False),
        ("cuda", torch.bfloat16, 128, 16, False),
        ("cpu", torch.bfloat16, 128, 256, False),
    ],
)
def test_where_the_kernel_serves(device: str, dtype: torch.dtype, head: int, page: int, serves: bool) -> None:
    layer = LayerShape(2, head, torch.device(device))
    assert kernel_serves([layer], dtype, page) is serves


def broken(*_: object) -> Tensor:
    raise RuntimeError("no kernel image")


def shifted(query: Tensor, keys: Tensor, values: Tensor, blocks: Blocks, scaling: Any, window: Any) -> Tensor:
    return by_gathering(query, keys, values, blocks, scaling, None if window is None else window + 1)


def sick(*given: Any) -> Tensor:
    return by_gathering(*given) * torch.nan


@pytest.mark.parametrize(
    ("kernel", "reason"), [(broken, "no kernel image"), (shifted, "differs"), (sick, "differs")]
)
def test_a_kernel_that_fails_or_differs_is_not_used(
    kernel: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(paged_attention, "by_kernel", kernel)
    monkeypatch.setattr(paged_attention, "kernel_serves", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        assert choose_attention("tiny", [LAYER], torch.bfloat16, 16) is by_gathering
    assert reason in caplog.text


def test_a_kernel_that_agrees_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "by_kernel", lambda *given: by_gathering(*given))
    monkeypatch.setattr(paged_attention, "kernel_serves", lambda *_: True)
    assert choose_attention("tiny", [LAYER], torch.bfloat16, 16) is paged_attention.by_kernel


def test_the_kernel_is_given_what_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its meaning, computed from the arguments alone, is the plain attention."""

    def by_the_book(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **rest: Any
    ) -> Tensor:
        assert (rest["num_splits"], rest["enable_gqa"]) == (1, True)
        assert all(t.dtype is torch.int32 for t in (cu_q, cu_k, rest["seqused_k"], rest["block_table"]))
        assert cu_k.diff().tolist() == rest["seqused_k"].tolist()
        assert max_q == cu_q.diff().max()
        assert max_k >= rest["seqused_k"].max()
        left, right = rest["window_size"]
        assert right == 0
        parts = []
        for i, used in enumerate(rest["seqused_k"].tolist()):
            q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
            k, v = (
                pool[rest["block_table"][i].long()].flatten(0, 1)[:used].transpose(0, 1) for pool in (key, value)
            )
            fold = q.shape[0] // k.shape[0]
            scores = q @ k.repeat_interleave(fold, 0).transpose(1, 2) * (rest["scale"] or q.shape[2] ** -0.5)
            at = torch.arange(used - q.shape[1], used).unsqueeze(1)
            gone = (torch.arange(used) > at) | ((torch.arange(used) < at - left) if left >= 0 else False)
            parts.append(
                (scores.masked_fill(gone, -torch.inf).softmax(-1) @ v.repeat_interleave(fold, 0)).transpose(0, 1)
            )
        return torch.cat(parts)

    monkeypatch.setattr(paged_attention, "varlen_attn", by_the_book)
    assert disagreement(by_kernel, LAYER, torch.float32, 16) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_agrees_on_this_device(head: int, dtype: torch.dtype) -> None:
    layer = LayerShape(2, head, torch.device("cuda:0"))
    assert disagreement(by_kernel, layer, dtype, 256) < 0.03
    assert choose_attention("tiny", [layer], dtype, 256) is by_kernel

"""Attention of a chunk of a prompt over its row of the cache, in bfloat16, tile by tile.

torch's attention for CPU multiplies what the causal mask takes away again, and in small products with a call each.
Here a tile is a few tokens with all query heads of a KV group, 48 rows. It walks over the keys that it can see in
blocks, with a running softmax in float32. Keys and values are first packed as `tiles` wants them, once for all tiles.
Blocks lie at fixed positions of the row, so a token comes out the same, bit for bit, wherever its prompt was cut.

Knows pools and rows of slots; does not know sequences or layers.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ensemble_core.members.kernels.base import Chunk
from ensemble_core.members.kernels.compiled.base import (
    Array,
    Frame,
    Number,
    bits,
    exp,
    float_of,
    inlined,
    largest,
    narrow,
    numbers,
    run,
    thread,
    word,
)
from ensemble_core.members.kernels.compiled.tiles import COLUMNS, ROWS, can_multiply, multiply, multiply_and_add

_BLOCK = 256  # keys whose scores are kept at once
_TILE = 48  # rows


def serves(dtype: torch.dtype, sizes: Collection[int]) -> bool:
    """Whether there is such an attention on this processor, for heads of these sizes."""
    return dtype is torch.bfloat16 and can_multiply() and all(size % COLUMNS == 0 for size in sizes)


def attend_chunk(
    query: Tensor,  # (T, H, D)
    keys: Tensor,  # (slots, Hkv, D)
    values: Tensor,  # (slots, Hkv, D)
    chunk: Chunk,
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """softmax(q K^T * scaling) V of every token over itself and what comes before it, (T, H, D).

    D is a multiple of 64; the chunk's own keys and values are in the cache. scaling: 1/sqrt(D). window: tokens that
    each looks at; None: all.
    """
    (num, heads, size), (slots, kv_heads, _) = query.shape, keys.shape
    assert query.dtype is keys.dtype is values.dtype is torch.bfloat16
    assert size % COLUMNS == 0
    query, out = query.contiguous(), torch.empty(query.shape, dtype=query.dtype)
    reach = chunk.start + num if window is None else window
    low = max(chunk.start - reach + 1, 0) // _BLOCK * _BLOCK
    blocks = -(-(chunk.start + num - low) // _BLOCK)
    packed_keys = torch.empty(kv_heads, blocks * _BLOCK // COLUMNS, size // 2, COLUMNS, 2, dtype=query.dtype)
    packed_values = torch.empty(kv_heads, size // COLUMNS, blocks * _BLOCK // 2, COLUMNS, 2, dtype=query.dtype)
    shape = (kv_heads, size, slots, chunk.first_slot + low, chunk.start + num - low, blocks * _BLOCK)
    run(_pack, query.dtype, 2 * keys.shape[1] * size * shape[4], *shape, keys, values, packed_keys, packed_values)
    scale = size**-0.5 if scaling is None else scaling
    words = (num, heads, size, kv_heads, blocks * _BLOCK, chunk.start - low, reach, bits(scale))
    run(_attend, query.dtype, query.numel() * num, *words, query, packed_keys, packed_values, out)
    return out


def _pack(frame: Frame) -> None:
    """Keys with 64 of them side by side, values in pairs one under the other; zeros past the last."""
    kv_heads, size, slots = word(frame, 1), word(frame, 2), word(frame, 3)
    first, num, padded = word(frame, 4), word(frame, 5), word(frame, 6)
    keys = carray(numbers(frame, 7), (slots, kv_heads, size))
    values = carray(numbers(frame, 8), (slots, kv_heads, size))
    packed_keys = carray(numbers(frame, 9), (kv_heads, padded // COLUMNS, size // 2, COLUMNS, 2))
    packed_values = carray(numbers(frame, 10), (kv_heads, size // COLUMNS, padded // 2, COLUMNS, 2))
    panels = padded // COLUMNS
    for item in range(thread(), kv_heads * panels, word(frame, 0)):
        head, panel = item // panels, item % panels
        for j in range(COLUMNS):
            at = panel * COLUMNS + j
            for i in range(size // 2):
                for k in range(2):
                    packed_keys[head, panel, i, j, k] = keys[first + at, head, 2 * i + k] if at < num else 0
            for part in range(size // COLUMNS):
                out = packed_values[head, part, at // 2]
                for i in range(COLUMNS):
                    out[i, at % 2] = values[first + at, head, part * COLUMNS + i] if at < num else 0


def _attend(frame: Frame) -> None:
    num, heads, size, kv_heads = word(frame, 1), word(frame, 2), word(frame, 3), word(frame, 4)
    padded, start, reach = word(frame, 5), word(frame, 6), word(frame, 7)
    scale = float_of(np.uint32(word(frame, 8)))
    query, out = carray(numbers(frame, 9), (num, heads, size)), carray(numbers(frame, 12), (num, heads, size))
    keys = carray(numbers(frame, 10), (kv_heads, padded // COLUMNS, size // 2, COLUMNS, 2))
    values = carray(numbers(frame, 11), (kv_heads, size // COLUMNS, padded // 2, COLUMNS, 2))
    fold = heads // kv_heads
    tokens = max(_TILE // fold, 1)
    rows = -(-tokens * fold // ROWS) * ROWS
    own, scores = np.zeros((rows, size), np.uint16), np.empty((rows, _BLOCK), np.float32)
    shares, total = np.empty((rows, _BLOCK), np.uint16), np.empty((rows, size), np.float32)
    tops, mass = np.empty(rows, np.float32), np.empty(rows, np.float32)
    tiles = -(-num // tokens)
    for item in range(thread(), kv_heads * tiles, word(frame, 0)):
        head, token = item // tiles, item % tiles * tokens
        count = min(tokens, num - token)
        for i in range(count * fold):
            own[i] = query[token + i // fold, head * fold + i % fold]
        tops[:], mass[:], total[:] = np.float32(-3e38), np.float32(0.0), np.float32(0.0)
        last = start + token + count  # one past the last key that anybody sees
        for block in range(max(start + token - reach + 1, 0) // _BLOCK, -(-last // _BLOCK)):
            first = block * _BLOCK
            seen = min(_BLOCK, last - first)
            _score(own, keys[head], first // COLUMNS, -(-seen // COLUMNS), scores)
            for i in range(count * fold):
                end = start + token + i // fold + 1 - first
                _soften(
                    scores[i], max(end - reach, 0), min(end, _BLOCK), seen, scale, i, tops, mass, total, shares
                )
            _add(shares, values[head], first // 2, -(-seen // 2), total)
        for i in range(count * fold):
            _store(total[i], mass[i], out[token + i // fold, head * fold + i % fold])


@inlined
def _score(own: Array, keys: Array, panel: int, num: int, scores: Array) -> None:
    """Products of all rows with `num` panels of keys."""
    width = own.shape[1] // 2
    for j in range(num):
        right = keys[panel + j].ctypes.data
        for i in range(0, own.shape[0], ROWS):
            left, goal = own[i:].ctypes.data, scores[i:, j * COLUMNS :].ctypes.data
            multiply(goal, scores.shape[1], left, width, right, COLUMNS, width)


@inlined
def _soften(
    scores: Array,
    begin: int,
    end: int,
    seen: int,
    scale: Number,
    i: int,
    tops: Array,
    mass: Array,
    total: Array,
    shares: Array,
) -> None:
    """A row's scores [begin, end) to shares relative to the largest so far; what was added before shrinks to them."""
    own = shares[i]
    if end <= begin:
        own[: seen + seen % 2] = 0
        return
    top = largest(scores[begin:end], tops[i])
    mass[i] = mass[i] * _shrink(tops[i], top, scale, total[i]) + _share(
        scores[begin:end], top, scale, own[begin:end]
    )
    tops[i] = top
    own[:begin] = 0
    own[end : seen + seen % 2] = 0


@inlined
def _shrink(before: Number, top: Number, scale: Number, total: Array) -> Number:
    """What is left of a share that was relative to another top; applied to what was added."""
    if before == top:
        return np.float32(1.0)
    shrunk = exp((before - top) * scale)
    for d in range(len(total)):
        total[d] *= shrunk
    return shrunk


@inlined
def _share(scores: Array, top: Number, scale: Number, shares: Array) -> Number:
    """Shares of scores relative to `top`, and their sum before they are rounded."""
    sum_ = np.float32(0.0)
    for j in range(len(scores)):
        share = exp((scores[j] - top) * scale)
        sum_ += share
        shares[j] = narrow(share, shares)
    return sum_


@inlined
def _add(shares: Array, values: Array, pair: int, num: int, total: Array) -> None:
    """Add `num` pairs of values from `pair` on, each by its share."""
    for part in range(total.shape[1] // COLUMNS):
        right = values[part, pair:].ctypes.data
        for i in range(0, total.shape[0], ROWS):
            goal, left = total[i:, part * COLUMNS :].ctypes.data, shares[i:].ctypes.data
            multiply_and_add(goal, total.shape[1], left, shares.shape[1] // 2, right, COLUMNS, num)


@inlined
def _store(total: Array, mass: Number, out: Array) -> None:
    for d in range(len(total)):
        out[d] = narrow(total[d] / mass, out)

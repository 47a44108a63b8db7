"""Attention of new tokens over cached rows, one token and KV head at a time.

torch's attention for CPU is made for long queries: with one token a sequence it calls a product of matrices for every
row and head, and reads the cache at a sixth of the memory's speed. Here each token reads its own span of the cache
once, in blocks with a running softmax in float32, whatever else is in the pass: no mask, no padding, no neighbours.
Sizes of heads are constants of the machine code, from 64 on; smaller ones share one code.

Knows pools and spans of slots; does not know sequences, rows or layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ensemble_core.members.kernels.base import Spans
from ensemble_core.members.kernels.compiled.base import (
    Array,
    Frame,
    bits,
    exp,
    float_of,
    inlined,
    integers,
    largest,
    narrow,
    numbers,
    run,
    thread,
    wide,
    word,
)

_BLOCK = 256  # keys whose scores are kept at once
_LEAST_CONSTANT = 64  # smaller heads are not worth seconds of compiling each


def attend_spans(
    query: Tensor,  # (N, H, D)
    keys: Tensor,  # (slots, Hkv, D)
    values: Tensor,  # (slots, Hkv, D)
    spans: Spans,
    scaling: float | None,
) -> Tensor:
    """softmax(q K^T * scaling) V of every token over its span, (N, H, D) in query's dtype. scaling: 1/sqrt(D)."""
    (num, heads, size), (slots, kv_heads, _) = query.shape, keys.shape
    assert query.dtype is keys.dtype is values.dtype
    query, out = query.contiguous(), torch.empty(query.shape, dtype=query.dtype)
    scale = size**-0.5 if scaling is None else scaling
    run(
        _loop(size, heads // kv_heads) if size >= _LEAST_CONSTANT else _loop(0, 0),
        query.dtype,
        spans.total * heads * size,
        *(num, heads, size, slots, kv_heads, bits(scale)),
        *(query, keys, values, spans.begin, spans.end, out),
    )
    return out


@lru_cache
def _loop(size: int, fold: int) -> Callable[[Frame], None]:
    """The loop for D = size and H / Hkv = fold; 0: whatever comes."""

    def attend(frame: Frame) -> None:
        num, heads, slots, kv_heads = word(frame, 1), word(frame, 2), word(frame, 4), word(frame, 5)
        d, f = (size if size else word(frame, 3)), (fold if fold else heads // kv_heads)
        query = carray(numbers(frame, 7), (num, heads, d))
        keys = carray(numbers(frame, 8), (slots, kv_heads, d))
        values = carray(numbers(frame, 9), (slots, kv_heads, d))
        begin, end = carray(integers(frame, 10), (num,)), carray(integers(frame, 11), (num,))
        out = carray(numbers(frame, 12), (num, heads, d))
        scale = float_of(np.uint32(word(frame, 6)))
        own = np.empty((f, d), np.float32)
        for item in range(thread(), num * kv_heads, word(frame, 0)):
            token, head = item // kv_heads, item % kv_heads
            for i in range(f):
                for j in range(d):
                    own[i, j] = wide(query[token, head * f + i, j]) * scale
            total = _attend(own, keys, values, head, begin[token], end[token], d, f)
            for i in range(f):
                for j in range(d):
                    out[token, head * f + i, j] = narrow(total[i, j], out)

    return attend


@inlined
def _attend(
    query: Array, keys: Array, values: Array, head: int, begin: int, end: int, size: int, fold: int
) -> Array:
    """What (fold, size) scaled queries of one KV head get from slots [begin, end)."""
    total = np.zeros((fold, size), np.float32)
    scores = np.empty((fold, _BLOCK), np.float32)
    tops, mass = np.full(fold, np.float32(-3e38)), np.zeros(fold, np.float32)
    for start in range(begin, end, _BLOCK):
        num = min(_BLOCK, end - start)
        _score(query, keys, start, num, head, scores, size, fold)
        for f in range(fold):
            _soften(scores, f, num, tops, mass, total, size)
        _add(scores, values, start, num, head, total, size, fold)
    for f in range(fold):
        for d in range(size):
            total[f, d] /= mass[f]
    return total


@inlined
def _score(
    query: Array, keys: Array, start: int, num: int, head: int, scores: Array, size: int, fold: int
) -> None:
    """Products of every query with keys [start, start + num); up to four queries share a read of a key."""
    for j in range(num):
        for f in range(0, fold // 4 * 4, 4):
            _score4(query, keys, start + j, head, scores, j, f, size)
        f = fold // 4 * 4
        if fold % 4 == 3:
            _score3(query, keys, start + j, head, scores, j, f, size)
        elif fold % 4 == 2:
            _score2(query, keys, start + j, head, scores, j, f, size)
        elif fold % 4 == 1:
            _score1(query, keys, start + j, head, scores, j, f, size)


@inlined
def _score4(query: Array, keys: Array, slot: int, head: int, scores: Array, j: int, f: int, size: int) -> None:
    a = b = c = d = np.float32(0.0)
    for i in range(size):
        key = wide(keys[slot, head, i])
        a += query[f, i] * key
        b += query[f + 1, i] * key
        c += query[f + 2, i] * key
        d += query[f + 3, i] * key
    scores[f, j], scores[f + 1, j], scores[f + 2, j], scores[f + 3, j] = a, b, c, d


@inlined
def _score3(query: Array, keys: Array, slot: int, head: int, scores: Array, j: int, f: int, size: int) -> None:
    a = b = c = np.float32(0.0)
    for i in range(size):
        key = wide(keys[slot, head, i])
        a += query[f, i] * key
        b += query[f + 1, i] * key
        c += query[f + 2, i] * key
    scores[f, j], scores[f + 1, j], scores[f + 2, j] = a, b, c


@inlined
def _score2(query: Array, keys: Array, slot: int, head: int, scores: Array, j: int, f: int, size: int) -> None:
    a = b = np.float32(0.0)
    for i in range(size):
        key = wide(keys[slot, head, i])
        a += query[f, i] * key
        b += query[f + 1, i] * key
    scores[f, j], scores[f + 1, j] = a, b


@inlined
def _score1(query: Array, keys: Array, slot: int, head: int, scores: Array, j: int, f: int, size: int) -> None:
    a = np.float32(0.0)
    for i in range(size):
        a += query[f, i] * wide(keys[slot, head, i])
    scores[f, j] = a


@inlined
def _soften(scores: Array, f: int, num: int, tops: Array, mass: Array, total: Array, size: int) -> None:
    """Scores of a block to shares relative to the largest so far; what was added before shrinks to the same."""
    top = largest(scores[f, :num], tops[f])
    shrunk, sum_ = exp(tops[f] - top), np.float32(0.0)
    for j in range(num):
        share = exp(scores[f, j] - top)
        scores[f, j] = share
        sum_ += share
    mass[f], tops[f] = mass[f] * shrunk + sum_, top
    for d in range(size):
        total[f, d] *= shrunk


@inlined
def _add(
    shares: Array, values: Array, start: int, num: int, head: int, total: Array, size: int, fold: int
) -> None:
    """Add values [start, start + num), each by its share; four a turn, so that sums are read and written less."""
    whole = num // 4 * 4
    for j in range(0, whole, 4):
        at = start + j
        for f in range(fold):
            a, b, c, d = shares[f, j], shares[f, j + 1], shares[f, j + 2], shares[f, j + 3]
            for i in range(size):
                first = a * wide(values[at, head, i]) + b * wide(values[at + 1, head, i])
                total[f, i] += first + c * wide(values[at + 2, head, i]) + d * wide(values[at + 3, head, i])
    for j in range(whole, num):
        for f in range(fold):
            for i in range(size):
                total[f, i] += shares[f, j] * wide(values[start + j, head, i])

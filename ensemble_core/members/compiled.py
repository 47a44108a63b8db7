"""Loops that numba compiles for this processor, where torch has no operation on CPU that reads memory once.

`attend_spans`: attention of new tokens over cached rows, one token and KV head at a time. torch's attention for CPU
is made for long queries: with one token a sequence it calls a product of matrices for every row and head, and reads
the cache at a sixth of the memory's speed. Here each token reads its own span of the cache once, in blocks with a
running softmax in float32, whatever else is in the pass: no mask, no padding, no neighbours. Sizes of heads are
constants of the machine code, from 64 on; smaller ones share one code.

`survey_logits`: the normaliser of logits and the peaks of stripes of columns, in one reading.

They run in torch's own OpenMP threads: its libgomp is the one that numba's `omp` layer finds loaded, and a second
pool would fight it for the cores. Without numba (`pip install 'unisono[cpu]'`), or where its `omp` layer is missing,
the import fails and callers stay with torch. Fast math is on but for NaN and infinity, which must come through: a
row that is not finite has to be seen. Machine code is kept on disk as long as this file does not change, so all
that is compiled is in it. Loops that are to become vector instructions count from 0 over a slice.

Knows tensors and spans of slots; does not know sequences, rows, layers or members.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from ensemble_core.members.attention import Spans

importlib.import_module("numba.np.ufunc.omppool")  # an ImportError is the answer: no threads to share

_FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}
_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}  # as numpy can see them

_BLOCK = 256  # keys whose scores are kept at once
_LANES = 16  # float32 in a vector of the widest instructions
_LEAST_CONSTANT = 64  # smaller heads are not worth seconds of compiling each
_PART = 32_768  # columns that one thread takes at once

Number = Any  # numpy scalars and arrays inside compiled code
Array = NDArray[Any]

if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "omp"


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """A parallel loop, its machine code kept beside the source or, where that is read-only, in the user's cache."""
    options = {"parallel": True, "nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder can be written
        return njit(**options)(function)  # type: ignore[no-any-return]


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a compiled loop; sizes that are constants outside are constants in it."""
    return njit(fastmath=_FAST, forceinline=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's memory as numpy sees it; bfloat16 as uint16. No copy."""
    return tensor.view(_DTYPES[tensor.dtype]).numpy()


def share_threads() -> None:
    """As many threads as torch has, from now on in the calling thread."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@intrinsic  # type: ignore[untyped-decorator]
def float_of(context: Any, bits: Any) -> Any:
    """The float32 with these bits (uint32)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(context: Any, number: Any) -> Any:
    """The bits (uint32) of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def wide(number: Any) -> Any:
    """A number of an `array` as float32."""
    raise NotImplementedError  # in compiled code alone


@overload(wide, inline="always")  # type: ignore[untyped-decorator]
def _wide(number: Any) -> Any:
    def of_bfloat16(number: Any) -> Any:
        return float_of(np.uint32(np.uint32(number) << np.uint32(16)))

    def of_float32(number: Any) -> Any:
        return number

    return of_bfloat16 if number == types.uint16 else of_float32


def narrow(number: Any, into: Any) -> Any:
    """A float32 as a number of the `array` that it goes into, rounded to even."""
    raise NotImplementedError  # in compiled code alone


@overload(narrow, inline="always")  # type: ignore[untyped-decorator]
def _narrow(number: Any, into: Any) -> Any:
    def to_bfloat16(number: Any, into: Any) -> Any:
        bits = bits_of(number)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def to_float32(number: Any, into: Any) -> Any:
        return number

    return to_bfloat16 if into.dtype == types.uint16 else to_float32


@inlined
def exp(x: Any) -> Any:
    """e^x of a float32 that is at most 0, to 2e-7 of its value; what is below -87 gives 1e-38, NaN stays NaN.

    2^n times a polynomial of the rest: one pass of vector instructions, where a call to the C library is none.
    """
    power = (np.float32(-87.0) if x < np.float32(-87.0) else x) * np.float32(1.4426950408889634)
    whole = np.floor(power + np.float32(0.5))
    rest = power - whole
    value = np.float32(1.535336188319500e-4)
    value = value * rest + np.float32(1.339887440266574e-3)
    value = value * rest + np.float32(9.618437357674640e-3)
    value = value * rest + np.float32(5.550332471162809e-2)
    value = value * rest + np.float32(2.402264791363012e-1)
    value = value * rest + np.float32(6.931472028550421e-1)
    value = value * rest + np.float32(1.0)
    return value * float_of(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


def attend_spans(
    query: Tensor,  # (N, H, D)
    keys: Tensor,  # (slots, Hkv, D)
    values: Tensor,  # (slots, Hkv, D)
    spans: Spans,
    scaling: float | None,
) -> Tensor:
    """softmax(q K^T * scaling) V of every token over its span, (N, H, D) in query's dtype. scaling: 1/sqrt(D)."""
    (_, heads, size), kv_heads = query.shape, keys.shape[1]
    query, out = query.contiguous(), torch.empty(query.shape, dtype=query.dtype)
    kernel = _kernel(size, heads // kv_heads) if size >= _LEAST_CONSTANT else _kernel(0, 0)
    share_threads()
    scale = size**-0.5 if scaling is None else scaling
    kernel(array(query), array(keys), array(values), *spans, np.float32(scale), array(out))
    return out


@lru_cache
def _kernel(size: int, fold: int) -> Callable[..., None]:
    """The loop for D = size and H / Hkv = fold; 0: whatever comes."""

    @compiled
    def attend(
        query: Array, keys: Array, values: Array, begin: Array, end: Array, scale: Number, out: Array
    ) -> None:
        heads = keys.shape[1]
        d, f = (size if size else query.shape[2]), (fold if fold else query.shape[1] // heads)
        for item in numba.prange(len(query) * heads):
            token, head = item // heads, item % heads
            own = np.empty((f, d), np.float32)
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
    largest, mass = np.full(fold, np.float32(-3e38)), np.zeros(fold, np.float32)
    for start in range(begin, end, _BLOCK):
        num = min(_BLOCK, end - start)
        _score(query, keys, start, num, head, scores, size, fold)
        for f in range(fold):
            _soften(scores, f, num, largest, mass, total, size)
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
def _soften(scores: Array, f: int, num: int, largest: Array, mass: Array, total: Array, size: int) -> None:
    """Scores of a block to shares relative to the largest so far; what was added before shrinks to the same."""
    top = _largest(scores[f, :num], largest[f])
    shrunk, sum_ = exp(largest[f] - top), np.float32(0.0)
    for j in range(num):
        share = exp(scores[f, j] - top)
        scores[f, j] = share
        sum_ += share
    mass[f], largest[f] = mass[f] * shrunk + sum_, top
    for d in range(size):
        total[f, d] *= shrunk


@inlined
def _largest(numbers: Array, top: Number) -> Number:
    """The largest of `top` and the numbers, lane by lane."""
    lanes, whole = np.full(_LANES, top), len(numbers) // _LANES * _LANES
    for j in range(0, whole, _LANES):
        for i in range(_LANES):
            lanes[i] = numbers[j + i] if numbers[j + i] > lanes[i] else lanes[i]
    for j in range(whole, len(numbers)):
        top = numbers[j] if numbers[j] > top else top
    for i in range(_LANES):
        top = lanes[i] if lanes[i] > top else top
    return top


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


def survey_logits(logits: Tensor, stripe: int) -> tuple[Tensor, Tensor, int]:
    """The fields of `candidates.Survey`. logits: (N, V) float32 or bfloat16; stripe: columns of a stripe."""
    logits = logits.contiguous()
    num, columns = logits.shape
    parts = -(-columns // _PART)
    beside = columns // (stripe * parts)
    peaks = torch.empty(num, beside * parts)
    tops, sums = (torch.empty(num, parts) for _ in range(2))
    share_threads()
    _survey(array(logits), stripe, peaks.numpy(), tops.numpy(), sums.numpy())
    top = tops.amax(dim=1)
    return top + (sums * (tops - top.unsqueeze(1)).exp()).sum(dim=1).log(), peaks, beside


@compiled
def _survey(logits: Array, stripe: int, peaks: Array, tops: Array, sums: Array) -> None:
    """tops, sums: (N, parts), the largest of each part and the sum of exp relative to it."""
    parts = tops.shape[1]
    beside = peaks.shape[1] // parts
    for item in numba.prange(len(logits) * parts):
        row, part = item // parts, item % parts
        start, whole = part * beside * stripe, (part + 1) * beside * stripe
        end = whole if part + 1 < parts else logits.shape[1]
        own = peaks[row, part * beside : (part + 1) * beside]
        _peaks(logits[row, start:whole], stripe, own)
        top = _largest(own, np.float32(-3e38))
        for j in range(whole, end):
            top = wide(logits[row, j]) if wide(logits[row, j]) > top else top
        total = _sum(logits[row, start:end], top)
        tops[row, part], sums[row, part] = top, total


@inlined
def _peaks(numbers: Array, stripe: int, peaks: Array) -> None:
    """The peak of every n-th number, for each of n."""
    num = len(peaks)
    for i in range(num):
        peaks[i] = wide(numbers[i])
    for j in range(1, stripe):
        line = numbers[j * num : (j + 1) * num]
        for i in range(num):
            number = wide(line[i])
            peaks[i] = number if number > peaks[i] else peaks[i]


@inlined
def _sum(numbers: Array, top: Number) -> Number:
    """The sum of exp relative to `top`."""
    total = np.float32(0.0)
    for j in range(len(numbers)):
        total += exp(wide(numbers[j]) - top)
    return total

"""The likeliest ids of rows of logits, found through the peaks of their stripes, in the order of `members.ranking`.

The `num`-th largest peak is a bound: at least `num` numbers reach it, and all of the first `num` do. So a row's peaks
are read for that bound, then the few stripes whose peak reaches it, and what is found there is put in order.

A number's key is 32 bits that rise with it, then 32 that fall with its id. Knows logits and stripes; does not know
what they are of.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ensemble_core.members.kernels.base import Survey
from ensemble_core.members.kernels.compiled.base import (
    Array,
    Frame,
    Number,
    bits_of,
    floats,
    inlined,
    integers,
    numbers,
    run,
    thread,
    wide,
    word,
)
from ensemble_core.members.ranking import BESIDE, STRIPE

_DIGITS = 11  # bits of a key that are looked at in turn


def likeliest(logits: Tensor, num: int, found: Survey) -> Tensor:
    """See `Kernels.likeliest`. logits: float32 or bfloat16, rows long enough for stripes."""
    logits = logits.contiguous()
    (rows, columns), stripes = logits.shape, found.peaks.shape[1]
    token_ids = torch.empty(rows, num, dtype=torch.long)
    words = (rows, columns, stripes, num)
    run(
        _likeliest, logits.dtype, 4 * found.peaks.numel(), *words, logits, found.peaks, found.normaliser, token_ids
    )
    return token_ids


def _likeliest(frame: Frame) -> None:
    rows, columns, stripes, num = word(frame, 1), word(frame, 2), word(frame, 3), word(frame, 4)
    logits, peaks = carray(numbers(frame, 5), (rows, columns)), carray(floats(frame, 6), (rows, stripes))
    normaliser, token_ids = carray(floats(frame, 7), (rows,)), carray(integers(frame, 8), (rows, num))
    keys, counts = np.empty(stripes, np.uint32), np.empty(1 << _DIGITS, np.int64)
    found = np.empty(columns, np.uint64)
    for row in range(thread(), rows, word(frame, 0)):
        for i in range(stripes):
            keys[i] = _key(peaks[row, i] - normaliser[row])
        bound = _nth(keys, counts, num)
        count = _reaching(logits[row], normaliser[row], keys, bound, found)
        found[:count].sort()
        for i in range(num):
            token_ids[row, i] = np.int64(np.uint64(0xFFFF_FFFF) - (found[count - 1 - i] & np.uint64(0xFFFF_FFFF)))


@inlined
def _key(number: Number) -> Number:
    """32 bits that rise with a number: -0.0 is 0.0, and NaN is infinite, so that a cut never hides it."""
    if number != number:
        return np.uint32(0xFF80_0000)
    bits = bits_of(number)
    negative = bits >= np.uint32(0x8000_0000)
    if negative and bits != np.uint32(0x8000_0000):
        return np.uint32(bits ^ np.uint32(0xFFFF_FFFF))
    return np.uint32(bits | np.uint32(0x8000_0000))


@inlined
def _nth(keys: Array, counts: Array, num: int) -> Number:
    """The `num`-th largest of at least so many keys, digit by digit."""
    bound, left, above = np.uint32(0), num, 32
    while above > 0:
        shift = max(above - _DIGITS, 0)
        last = (1 << (above - shift)) - 1  # the highest digit
        counts[:] = 0
        for i in range(len(keys)):
            if np.int64(keys[i]) >> above == np.int64(bound) >> above:
                counts[(np.int64(keys[i]) >> shift) & last] += 1
        digit = last
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        bound, above = np.uint32(np.int64(bound) | (digit << shift)), shift
    return bound


@inlined
def _reaching(logits: Array, normaliser: Number, keys: Array, bound: Number, found: Array) -> int:
    """How many numbers of a row reach the bound; their keys, with ids, are put into `found`."""
    count = 0
    for stripe in range(len(keys)):
        if keys[stripe] >= bound:
            first = stripe + stripe // BESIDE * (STRIPE - 1) * BESIDE
            for place in range(first, first + STRIPE * BESIDE, BESIDE):
                count = _note(logits, normaliser, place, bound, found, count)
    for place in range(len(keys) * STRIPE, len(logits)):
        count = _note(logits, normaliser, place, bound, found, count)
    return count


@inlined
def _note(logits: Array, normaliser: Number, place: int, bound: Number, found: Array, count: int) -> int:
    key = _key(wide(logits[place]) - normaliser)
    if key < bound:
        return count
    found[count] = (np.uint64(key) << np.uint64(32)) | np.uint64(0xFFFF_FFFF - place)
    return count + 1

"""The normaliser of logits and the peaks of stripes of columns, in one reading.

Knows logits; does not know what they are of.
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
    exp,
    floats,
    inlined,
    largest,
    numbers,
    run,
    thread,
    wide,
    word,
)
from ensemble_core.members.ranking import BESIDE, STRIPE

_PART = 32_768  # columns that one thread takes at once


def survey(logits: Tensor) -> Survey:
    """See `Kernels.survey`. logits: float32 or bfloat16."""
    logits = logits.contiguous()
    num, columns = logits.shape
    block = STRIPE * BESIDE
    part = block * max(_PART // block, 1)
    parts = -(-columns // part)
    peaks = torch.empty(num, columns // block * BESIDE)
    tops, sums = (torch.empty(num, parts) for _ in range(2))
    run(
        _survey, logits.dtype, logits.numel(), num, columns, STRIPE, BESIDE, part, parts, logits, peaks, tops, sums
    )
    top = tops.amax(dim=1)
    return Survey(top + (sums * (tops - top.unsqueeze(1)).exp()).sum(dim=1).log(), peaks)


def _survey(frame: Frame) -> None:
    """tops, sums: (N, parts), the largest of each part and the sum of exp relative to it."""
    num, columns, stripe, beside = word(frame, 1), word(frame, 2), word(frame, 3), word(frame, 4)
    part, parts, block = word(frame, 5), word(frame, 6), stripe * beside
    logits = carray(numbers(frame, 7), (num, columns))
    peaks = carray(floats(frame, 8), (num, columns // block * beside))
    tops, sums = carray(floats(frame, 9), (num, parts)), carray(floats(frame, 10), (num, parts))
    for item in range(thread(), num * parts, word(frame, 0)):
        row, at = item // parts, item % parts
        start, end = at * part, min((at + 1) * part, columns)
        blocks = (end - start) // block
        own = peaks[row, start // stripe : start // stripe + blocks * beside]
        for i in range(blocks):
            _peaks(logits[row, start + i * block : start + (i + 1) * block], own[i * beside : (i + 1) * beside])
        top = largest(own, np.float32(-3e38))
        for j in range(start + blocks * block, end):
            top = wide(logits[row, j]) if wide(logits[row, j]) > top else top
        tops[row, at], sums[row, at] = top, _sum(logits[row, start:end], top)


@inlined
def _peaks(columns: Array, peaks: Array) -> None:
    """The peaks of the stripes of a block, which are an even number of columns; two lines at once are faster."""
    num = len(peaks)
    for i in range(num):
        peaks[i] = wide(columns[i])
    for j in range(0, len(columns), 2 * num):
        line, next_line = columns[j : j + num], columns[j + num : j + 2 * num]
        for i in range(num):
            number = wide(line[i]) if wide(line[i]) > wide(next_line[i]) else wide(next_line[i])
            peaks[i] = number if number > peaks[i] else peaks[i]


@inlined
def _sum(columns: Array, top: Number) -> Number:
    """The sum of exp relative to `top`."""
    total = np.float32(0.0)
    for j in range(len(columns)):
        total += exp(wide(columns[j]) - top)
    return total

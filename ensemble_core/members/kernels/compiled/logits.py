"""The normaliser of logits and the peaks of stripes of columns, in one reading.

Knows logits; does not know what they are of.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

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

_PART = 32_768  # columns that one thread takes at once


def survey_logits(logits: Tensor, stripe: int) -> tuple[Tensor, Tensor, int]:
    """The fields of `candidates.Survey`. logits: (N, V) float32 or bfloat16; stripe: columns of a stripe."""
    logits = logits.contiguous()
    num, columns = logits.shape
    parts = -(-columns // _PART)
    beside = columns // (stripe * parts)
    peaks = torch.empty(num, beside * parts)
    tops, sums = (torch.empty(num, parts) for _ in range(2))
    words = (num, columns, stripe, parts, beside, logits, peaks, tops, sums)
    run(_survey, logits.dtype, logits.numel(), *words)
    top = tops.amax(dim=1)
    return top + (sums * (tops - top.unsqueeze(1)).exp()).sum(dim=1).log(), peaks, beside


def _survey(frame: Frame) -> None:
    """tops, sums: (N, parts), the largest of each part and the sum of exp relative to it."""
    num, columns, stripe, parts, beside = (
        word(frame, 1),
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
    )
    logits = carray(numbers(frame, 6), (num, columns))
    peaks = carray(floats(frame, 7), (num, parts * beside))
    tops, sums = carray(floats(frame, 8), (num, parts)), carray(floats(frame, 9), (num, parts))
    for item in range(thread(), num * parts, word(frame, 0)):
        row, part = item // parts, item % parts
        start, whole = part * beside * stripe, (part + 1) * beside * stripe
        end = whole if part + 1 < parts else columns
        own = peaks[row, part * beside : (part + 1) * beside]
        _peaks(logits[row, start:whole], stripe, own)
        top = largest(own, np.float32(-3e38))
        for j in range(whole, end):
            top = wide(logits[row, j]) if wide(logits[row, j]) > top else top
        total = _sum(logits[row, start:end], top)
        tops[row, part], sums[row, part] = top, total


@inlined
def _peaks(columns: Array, stripe: int, peaks: Array) -> None:
    """The peak of every n-th number, for each of n."""
    num = len(peaks)
    for i in range(num):
        peaks[i] = wide(columns[i])
    for j in range(1, stripe):
        line = columns[j * num : (j + 1) * num]
        for i in range(num):
            number = wide(line[i])
            peaks[i] = number if number > peaks[i] else peaks[i]


@inlined
def _sum(columns: Array, top: Number) -> Number:
    """The sum of exp relative to `top`."""
    total = np.float32(0.0)
    for j in range(len(columns)):
        total += exp(wide(columns[j]) - top)
    return total

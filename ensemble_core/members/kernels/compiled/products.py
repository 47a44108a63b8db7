"""Products of a few rows, or many, with one large weight of bfloat16 numbers, which is read once from end to end.

The weight is packed in panels of 64 outputs, each a run of memory in the order in which `tiles` reads it. A thread
takes panels that follow each other, and for each panel six rows at a time: the first six read it from memory, the
others from the cache. A decode step is bound by that reading: with up to eight rows this reaches the memory's speed,
where a library's call stays at two thirds of it. A row's sums run along K in order, so a row does not depend on the
others.

Knows numbers; does not know layers.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ensemble_core.members.kernels.compiled.base import Frame, inlined, narrow, numbers, run, thread, wide, word
from ensemble_core.members.kernels.compiled.tiles import COLUMNS, ROWS, can_multiply, product

_BLOCK = 48  # rows that a thread takes of a panel, if there are so many

_one, _two, _three, _four, _five, _six = (product(rows) for rows in range(1, ROWS + 1))


def serves(weight: Tensor) -> bool:
    """Whether there is such a product for this weight (out, in) on this processor."""
    fits = weight.dim() == 2 and weight.shape[0] % COLUMNS == 0 and weight.shape[1] % 2 == 0
    return fits and weight.dtype is torch.bfloat16 and weight.device.type == "cpu" and can_multiply()


class PackedProduct:
    """See `kernels.base.Product`. weight: (out / 64, in / 2, 64, 2)."""

    def __init__(self, weight: Tensor) -> None:
        num_out, num_in = weight.shape
        self.weight = weight.view(num_out // COLUMNS, COLUMNS, num_in // 2, 2).transpose(1, 2).contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product.__call__`."""
        (panels, pairs, _, _), num = self.weight.shape, len(x)
        out = torch.empty(num, panels * COLUMNS, dtype=x.dtype)
        words = (num, pairs, panels, int(bias is not None), x.contiguous(), self.weight)
        run(_multiply, x.dtype, self.weight.numel(), *words, out if bias is None else bias, out)
        return out


def _multiply(frame: Frame) -> None:
    num, pairs, panels, biased = word(frame, 1), word(frame, 2), word(frame, 3), word(frame, 4)
    x, out = carray(numbers(frame, 5), (num, 2 * pairs)), carray(numbers(frame, 8), (num, panels * COLUMNS))
    weight = carray(numbers(frame, 6), (panels, pairs, COLUMNS, 2))
    bias = carray(numbers(frame, 7), panels * COLUMNS)
    sums = np.empty((ROWS, COLUMNS), np.float32)
    blocks = max(num // _BLOCK, 1)
    first = panels * blocks * thread() // word(frame, 0)
    last = panels * blocks * (thread() + 1) // word(frame, 0)
    for item in range(first, last):
        panel, block = item // blocks, item % blocks
        start, stop = num * block // blocks, num * (block + 1) // blocks
        for row in range(start, stop, ROWS):
            rows = min(ROWS, stop - row)
            _tile(sums.ctypes.data, x[row:].ctypes.data, weight[panel].ctypes.data, pairs, rows)
            for i in range(rows):
                goal = out[row + i, panel * COLUMNS : (panel + 1) * COLUMNS]
                if biased:
                    for j in range(COLUMNS):
                        sums[i, j] += wide(bias[panel * COLUMNS + j])
                for j in range(COLUMNS):
                    goal[j] = narrow(sums[i, j], goal)


@inlined
def _tile(sums: int, x: int, weight: int, pairs: int, rows: int) -> None:
    """The product of so many rows with a panel."""
    if rows == 6:
        _six(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)
    elif rows == 5:
        _five(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)
    elif rows == 4:
        _four(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)
    elif rows == 3:
        _three(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)
    elif rows == 2:
        _two(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)
    else:
        _one(sums, COLUMNS, x, pairs, weight, COLUMNS, pairs)

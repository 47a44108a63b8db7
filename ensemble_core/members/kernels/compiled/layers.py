"""What a decoder layer does between its products, each in one reading: sums with norms, gates, rotations.

torch takes four operations for a norm and as many for a rotation, each with a pass over memory and a call. All sums
are float32 and are rounded once. Knows tensors; does not know layers or families.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import carray
from torch import Tensor
from torch.nn.functional import gelu, silu

from ensemble_core.members.kernels.base import Activation, Norm
from ensemble_core.members.kernels.compiled.base import (
    Array,
    Frame,
    Number,
    bits,
    exp,
    float_of,
    floats,
    inlined,
    narrow,
    numbers,
    run,
    thread,
    wide,
    word,
)
from ensemble_core.members.kernels.plain import PlainKernels


def add_and_norm(x: Tensor, change: Tensor, after: Norm | None, before: Norm) -> tuple[Tensor, Tensor]:
    """See `Kernels.add_and_norm`."""
    assert x.shape == change.shape
    assert x.dtype is change.dtype
    total, normed = torch.empty_like(x), torch.empty_like(x)
    first = before if after is None else after
    words = (*x.shape, int(after is not None), bits(first.epsilon), bits(before.epsilon))
    run(_add_and_norm, x.dtype, x.numel(), *words, x, change, first.weight, before.weight, total, normed)
    return total, normed


def gate(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `Kernels.gate`; an activation that is neither SiLU nor GELU by tanh stays with torch."""
    smooth = _is_smooth(activation)
    if smooth is None:
        return _plain.gate(gate_up, activation)
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
    run(_gate, out.dtype, gate_up.numel(), *out.shape, int(smooth), gate_up, out)
    return out


def turn(heads: Tensor, num: int, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
    """See `Kernels.turn`."""
    assert heads.dtype is cos.dtype is sin.dtype
    out = torch.empty(heads.shape[0], num, heads.shape[2], dtype=heads.dtype)
    weight, epsilon = (_none, 0.0) if norm is None else (norm.weight, norm.epsilon)
    words = (*out.shape, heads.shape[1], int(norm is not None), bits(epsilon))
    run(_turn, out.dtype, heads.numel(), *words, heads, weight, cos, sin, out)
    return out


_plain, _none = PlainKernels(), torch.empty(0)


@lru_cache
def _is_smooth(activation: Activation) -> bool | None:
    """True for GELU by tanh, False for SiLU, None for others; found out by what it does."""
    probe = torch.linspace(-6.0, 6.0, 101)
    found = activation(probe)
    for smooth, known in ((False, silu(probe)), (True, gelu(probe, approximate="tanh"))):
        if torch.allclose(found, known, atol=1e-6):
            return smooth
    return None


def _add_and_norm(frame: Frame) -> None:
    num, width, has_after = word(frame, 1), word(frame, 2), word(frame, 3)
    epsilon_after, epsilon_before = float_of(np.uint32(word(frame, 4))), float_of(np.uint32(word(frame, 5)))
    x, change = carray(numbers(frame, 6), (num, width)), carray(numbers(frame, 7), (num, width))
    after, before = carray(floats(frame, 8), (width,)), carray(floats(frame, 9), (width,))
    total, normed = carray(numbers(frame, 10), (num, width)), carray(numbers(frame, 11), (num, width))
    for row in range(thread(), num, word(frame, 0)):
        if has_after:
            _add_scaled(x[row], change[row], after, _scale(change[row], epsilon_after), total[row])
        else:
            _add(x[row], change[row], total[row])
        _norm(total[row], before, _scale(total[row], epsilon_before), normed[row])


@inlined
def _scale(x: Array, epsilon: Number) -> Number:
    """1 / sqrt(mean of squares + epsilon)."""
    squares = np.float32(0.0)
    for i in range(len(x)):
        number = wide(x[i])
        squares += number * number
    return np.float32(1.0) / np.sqrt(squares / np.float32(len(x)) + epsilon)


@inlined
def _add(x: Array, change: Array, out: Array) -> None:
    for i in range(len(x)):
        out[i] = narrow(wide(x[i]) + wide(change[i]), out)


@inlined
def _add_scaled(x: Array, change: Array, weight: Array, scale: Number, out: Array) -> None:
    for i in range(len(x)):
        out[i] = narrow(wide(x[i]) + wide(change[i]) * scale * weight[i], out)


@inlined
def _norm(x: Array, weight: Array, scale: Number, out: Array) -> None:
    for i in range(len(x)):
        out[i] = narrow(wide(x[i]) * scale * weight[i], out)


def _gate(frame: Frame) -> None:
    num, width, smooth = word(frame, 1), word(frame, 2), word(frame, 3)
    gate_up, out = carray(numbers(frame, 4), (num, 2 * width)), carray(numbers(frame, 5), (num, width))
    for row in range(thread(), num, word(frame, 0)):
        _gated(gate_up[row, :width], gate_up[row, width:], smooth, out[row])


@inlined
def _gated(gates: Array, ups: Array, smooth: int, out: Array) -> None:
    if smooth:
        for i in range(len(out)):
            x = wide(gates[i])
            inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
            out[i] = narrow(x * _sigmoid(inner) * wide(ups[i]), out)
    else:
        for i in range(len(out)):
            x = wide(gates[i])
            out[i] = narrow(x * _sigmoid(x) * wide(ups[i]), out)


@inlined
def _sigmoid(x: Number) -> Number:
    """1 / (1 + e^-x); twice the inner of a tanh gives half of 1 + tanh."""
    small = exp(-abs(x))
    return (np.float32(1.0) if x >= np.float32(0.0) else small) / (np.float32(1.0) + small)


def _turn(frame: Frame) -> None:
    num, turned, size, heads, has_norm = (
        word(frame, 1),
        word(frame, 2),
        word(frame, 3),
        word(frame, 4),
        word(frame, 5),
    )
    epsilon = float_of(np.uint32(word(frame, 6)))
    x, out = carray(numbers(frame, 7), (num, heads, size)), carray(numbers(frame, 11), (num, turned, size))
    weight = carray(floats(frame, 8), (turned, size))
    cos, sin = carray(numbers(frame, 9), (num, size)), carray(numbers(frame, 10), (num, size))
    own = np.empty(size, np.float32)
    for row in range(thread(), num, word(frame, 0)):
        for head in range(turned):
            if has_norm:
                _widen_scaled(x[row, head], weight[head], _scale(x[row, head], epsilon), own)
            else:
                _widen(x[row, head], own)
            _turned(own, cos[row], sin[row], out[row, head])


@inlined
def _widen(x: Array, out: Array) -> None:
    for i in range(len(x)):
        out[i] = wide(x[i])


@inlined
def _widen_scaled(x: Array, weight: Array, scale: Number, out: Array) -> None:
    for i in range(len(x)):
        out[i] = wide(x[i]) * scale * weight[i]


@inlined
def _turned(x: Array, cos: Array, sin: Array, out: Array) -> None:
    half = len(x) // 2
    first, second = x[:half], x[half:]
    for i in range(half):
        out[i] = narrow(first[i] * wide(cos[i]) + second[i] * wide(sin[i]), out)
    for i in range(half):
        out[half + i] = narrow(second[i] * wide(cos[half + i]) + first[i] * wide(sin[half + i]), out)

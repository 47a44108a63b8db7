"""What decoder layers do between their products: residual sums with norms, gates, rotations.

In torch's operations anywhere, and on CPU as compiled loops, which read each number once and round once. Does not
know products, caches or families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ensemble_core.members.kernels import compiled

Activation = Callable[[Tensor], Tensor]


class Norm:
    """RMS norm over the last dimension, computed in float32. weight: (d,) or (heads, d)."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon  # float32
        self._share = 1.0 / weight.shape[-1]
        self._least = torch.tensor(epsilon, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight, in x's dtype."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self._least, length, length, value=self._share).rsqrt_()
        return torch.mul(x * scale, self.weight, out=torch.empty_like(x))


class Arithmetic(Protocol):
    """The same numbers in one way or another."""

    def add_and_norm(self, x: Tensor, change: Tensor, after: Norm | None, before: Norm) -> tuple[Tensor, Tensor]:
        """x + change, and its norm by `before`, (N, d) each; `after`, if there is one, norms the change first."""

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, (N, 2 f) -> (N, f)."""

    def turn(self, heads: Tensor, num: int, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """The first `num` of (N, heads, D), normed if there is a norm, and rotated: (N, num, D).

        cos, sin: (N, 1, D); the sine is signed so that the rotated half need not be negated.
        """


class TorchArithmetic:
    """In torch's operations."""

    def add_and_norm(self, x: Tensor, change: Tensor, after: Norm | None, before: Norm) -> tuple[Tensor, Tensor]:
        """See `Arithmetic.add_and_norm`."""
        total = x + (change if after is None else after(change))
        return total, before(total)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `Arithmetic.gate`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def turn(self, heads: Tensor, num: int, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Arithmetic.turn`."""
        turned = heads[:, :num] if norm is None else norm(heads[:, :num])
        return (turned * cos).addcmul_(turned.roll(turned.shape[2] // 2, -1), sin)


def arithmetic_for(device: torch.device, dtype: torch.dtype) -> Arithmetic:
    """The fastest for tensors on this device."""
    if not compiled.serves(device, dtype):
        return TorchArithmetic()
    from ensemble_core.members.kernels.compiled.layers import CompiledArithmetic

    return CompiledArithmetic()

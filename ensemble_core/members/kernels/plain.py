"""Torch's own operations: they serve every device and dtype, and compiled loops are tested against them."""

from __future__ import annotations

from torch import Tensor

from ensemble_core.members.kernels.base import Activation, Norm


class PlainKernels:
    """See `base.Kernels`."""

    attend_spans = None

    def add_and_norm(self, x: Tensor, change: Tensor, after: Norm | None, before: Norm) -> tuple[Tensor, Tensor]:
        """See `Kernels.add_and_norm`."""
        total = x + (change if after is None else after(change))
        return total, before(total)

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `Kernels.gate`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return activation(gate) * up

    def turn(self, heads: Tensor, num: int, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Kernels.turn`."""
        turned = heads[:, :num] if norm is None else norm(heads[:, :num])
        return (turned * cos).addcmul_(turned.roll(turned.shape[2] // 2, -1), sin)

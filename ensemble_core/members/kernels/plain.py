"""Torch's own operations: they serve every device and dtype, and compiled loops are tested against them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ensemble_core.members.kernels.base import Activation, Norm, Survey
from ensemble_core.members.ranking import peaks, ranked, within_reach

_CHUNK = 65_536  # columns that the normaliser takes at once
_LINE = 1024  # columns of a sum


class PlainKernels:
    """See `base.Kernels`."""

    attend_spans = None

    def product(self, weight: Tensor) -> None:
        """See `Kernels.product`."""

    def chunk_attention(self, dtype: torch.dtype, sizes: Collection[int]) -> None:
        """See `Kernels.chunk_attention`."""

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

    def survey(self, logits: Tensor) -> Survey:
        """See `Kernels.survey`."""
        return Survey(_normaliser(logits), peaks(logits))

    def likeliest(self, logits: Tensor, num: int, found: Survey) -> Tensor:
        """See `Kernels.likeliest`."""
        normaliser = found.normaliser.unsqueeze(1)
        columns = within_reach(found.peaks.float() - normaliser, num, logits.shape[1])
        return columns.gather(1, ranked(logits.gather(1, columns).float() - normaliser, num, columns))


PLAIN = PlainKernels()


def _normaliser(logits: Tensor) -> Tensor:
    """Log of the sum of exp over columns, (N, V) any float dtype -> (N,) float32.

    Summed by lines of columns first: torch shares a long sum between threads where it is the only one, and then a row
    alone would come out otherwise than among others.
    """
    num, columns = logits.shape
    peak = logits.amax(dim=1, keepdim=True).float()
    total = torch.zeros_like(peak)
    lines = -(-min(_CHUNK, columns) // _LINE)
    buffer = torch.zeros(num, lines * _LINE, device=logits.device)
    for chunk in torch.split(logits, _CHUNK, dim=1):
        buffer[:, : chunk.shape[1]].copy_(chunk).sub_(peak).exp_()
        buffer[:, chunk.shape[1] :] = 0.0
        total += buffer.view(num, lines, _LINE).sum(dim=2).sum(dim=1, keepdim=True)
    return (peak + total.log()).squeeze(1)

"""What an adapter adds to a linear layer: y = W x + B (A x), the scaling folded into B.

The layer itself is shared with the base. Where projections are merged, so are their adapters: the rows of all A lie
under each other, each B in its own block of outputs and ranks, so that a merged layer costs two small products more,
whatever it is merged of. A compiled product makes 64 outputs at once, so A is padded to that with ranks of zeros, of
which B sees no more than it must.

Knows weights; does not know where adapters come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensemble_core.members.body.linear import Linear
from ensemble_core.members.kernels.base import Kernels

_PANEL = 64  # outputs that a compiled product packs together


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter of one projection. down: A, (r, in). up: B times the scaling, (out, r)."""

    down: Tensor
    up: Tensor


LowRanks = Mapping[str, LowRank]  # the projection's path in the model -> what is added to it


class AdaptedLinear:
    """A layer of the base, and what an adapter adds to it. See `Linear`, which it replaces."""

    def __init__(self, base: Linear, adapter: LowRank, kernels: Kernels) -> None:
        down, up = _packable(adapter, kernels)
        self._base, self._rank = base, up.shape[1]
        self._down, self._up = Linear(down, None, kernels), Linear(up, None, kernels)
        self.num_bytes = base.num_bytes + self._down.num_bytes + self._up.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return self._base(x).add_(self._up(self._down(x)[:, : self._rank].contiguous()))

    def make_steady(self) -> bool:
        """See `Linear.make_steady`."""
        return all(linear.make_steady() for linear in (self._base, self._down, self._up))


Projection = Linear | AdaptedLinear


def side_by_side(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    """The adapters of merged projections as one; None: of a projection without one. sizes: outputs of each."""
    given = [part for part in parts if part is not None]
    blocks = [
        given[0].up.new_zeros(size, 0) if part is None else part.up
        for part, size in zip(parts, sizes, strict=True)
    ]
    return LowRank(torch.cat([part.down for part in given]), torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


def _packable(adapter: LowRank, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """A and B, with ranks of zeros where that gets them a compiled product: A up to a panel, B up to a pair."""
    rank = len(adapter.down)
    down = pad(adapter.down, (0, 0, 0, -rank % _PANEL))
    if kernels.product(down) is None:
        return adapter.down, adapter.up
    return down, pad(adapter.up, (0, rank % 2))

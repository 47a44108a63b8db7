"""Pools in main's vocabulary by the direct map: the plain baseline, and often the one to beat.

With p~_i = p_i M_i, member i's distribution mapped into main's vocabulary (see `mapping` and `support`):

- `linear`: p = sum_i w_i p~_i.
- `log-linear`: p ~ prod_i p~_i^w_i. Where an assistant has no token that maps to main's, it abstains: main's own
  share stands in. Mass outside the support is bounded by prod_i tail_i^w_i (Hoelder), which is what is taken.

Does not know how tokens are mapped, or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import FUSIONS, ROUNDING, Fused, FusionSpace, lead, linear_pool
from ensemble_core.fusion.support import ClosedSupport, TokenPool, concluded
from ensemble_core.members.base import Candidates


class ProjectionOptions(BaseModel):
    """Options of the `projection` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: Literal["linear", "log-linear"] = Field(
        "linear", description="Weighted mean, or weighted geometric mean."
    )

    @property
    def is_mixture(self) -> bool:
        """See `fusion.base.is_mixture`."""
        return self.pool == "linear"


@FUSIONS.register("projection", ProjectionOptions)
class ProjectionFusion(TokenPool):
    """Linear or log-linear pool over mapped distributions; see the module."""

    name = "projection"

    def __init__(self, space: FusionSpace, options: ProjectionOptions) -> None:
        super().__init__(space)
        self._linear = options.pool == "linear"

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        if self._linear:
            return super().fuse(candidates, weights)
        support, weights = self.heard(candidates, weights)
        return concluded(support, _log_linear(support, weights))

    def carried(self, member: int, token_ids: Tensor) -> Tensor:
        """See `Mixture.carried`."""
        return self._space.carried(member, token_ids)

    def certified(self, main: Candidates, weights: Tensor) -> Tensor:
        """See `Certifying.certified`. Of a linear pool only.

        With main's weight w its token has w p at least, another one w p' + (1 - w) at most: what assistants leave to
        main widens the gap.
        """
        first, second = (logs.exp() for logs in lead(main))
        own = weights[:, 0] if self._linear else torch.zeros_like(first)
        return own * (first - second) > 1 - own + ROUNDING


def _log_linear(support: ClosedSupport, weights: Tensor) -> Tensor:
    """(B, S + 1), rows sum to 1."""
    shares = support.shares()
    main = shares[:, 0].clone()
    logs = shares.log_()
    for member in range(1, shares.shape[1]):
        inside = logs[:, member, :-1]
        torch.where(support.nameable.has(member), inside, logs[:, 0, :-1], out=inside)
    # 0 * log 0 is 0: a member without weight says nothing.
    logs.masked_fill_(weights.unsqueeze(2) == 0.0, 0.0)
    pooled = linear_pool(weights, logs)
    hopeless = pooled.amax(dim=1, keepdim=True).isneginf()  # nothing is possible to all: main decides
    return torch.where(hopeless, main, torch.softmax(pooled, dim=1))

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

from ensemble_core.fusion.base import FUSIONS, Fused, FusionSpace, Views, linear_pool
from ensemble_core.fusion.support import TokenPool
from ensemble_core.members.base import Candidates


class ProjectionOptions(BaseModel):
    """Options of the `projection` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: Literal["linear", "log-linear"] = Field(
        "linear", description="Weighted mean, or weighted geometric mean."
    )


@FUSIONS.register("projection", ProjectionOptions)
class ProjectionFusion(TokenPool):
    """Linear or log-linear pool over mapped distributions; see the module."""

    name = "projection"

    def __init__(self, space: FusionSpace, options: ProjectionOptions) -> None:
        super().__init__(space)
        self._linear = options.pool == "linear"

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        views = self.views(candidates, weights)
        return self.conclude(views, linear_pool(views) if self._linear else self._log_linear(views))

    def _log_linear(self, views: Views) -> Tensor:
        """(B, S + 1), rows sum to 1."""
        inside, outside = views.shares[:, :, :-1], views.shares[:, :, -1:]
        inside = torch.where(self._space.can_name(views.token_ids), inside, inside[:, :1])
        shares = torch.cat([inside, outside], dim=2)
        # 0 * log 0 is 0: a member without weight says nothing.
        logs = torch.where(views.weights.unsqueeze(2) == 0.0, 0.0, shares.log())
        pooled = torch.einsum("bm,bmx->bx", views.weights, logs)
        hopeless = pooled.amax(dim=1, keepdim=True).isneginf()  # nothing is possible to all: main decides
        return torch.where(hopeless, views.shares[:, 0], torch.softmax(pooled, dim=1))

"""EVA's filter (Xu et al. 2024, arXiv 2404.09492): at each step only members whom another one bears out are pooled.

Member i is kept where its top token (of p~_i, mapped into main's vocabulary) is among the top n of p~_j for some
other member j. The weights of those kept are scaled to sum to 1. Where nobody is kept, or nobody kept has any
weight, main decides alone: the members contradict each other, and main's is the vocabulary that needs no map.

Does not know how tokens are mapped, or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import FUSIONS, FusionSpace
from ensemble_core.fusion.support import ClosedSupport, TokenPool
from ensemble_core.members.base import Candidates


class EvaOptions(BaseModel):
    """Options of the `eva` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: int = Field(3, ge=1, le=100, description="How far down another member's ranking the top token may stand.")


@FUSIONS.register("eva", EvaOptions)
class EvaFusion(TokenPool):
    """Linear pool of members that agree; see the module."""

    name = "eva"

    def __init__(self, space: FusionSpace, options: EvaOptions) -> None:
        super().__init__(space)
        self._top = options.top

    def reweighted(self, support: ClosedSupport, candidates: Sequence[Candidates], weights: Tensor) -> Tensor:
        """The weights of those kept."""
        weights = torch.where(_borne_out(support, self._top), weights, 0.0)
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1.0
        total = weights.sum(dim=1, keepdim=True)
        return torch.where(total > 0, weights / total, alone)


def _borne_out(support: ClosedSupport, num_top: int) -> Tensor:
    """Which members' top token stands in another's top, (B, M) bool."""
    top = support.top(num_top, support.inside())  # (B, M, n)
    leaders = top[:, :, :1].unsqueeze(3)  # (B, M, 1, 1)
    nothing = support.token_ids.shape[1]
    among = (leaders == top.unsqueeze(1)) & (leaders < nothing)  # (B, M, M, n)
    others = ~torch.eye(top.shape[1], dtype=torch.bool, device=top.device)
    return (among.any(dim=3) & others).any(dim=2)

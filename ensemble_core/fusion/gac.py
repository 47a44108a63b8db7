"""GaC (Yu et al. 2024, arXiv 2406.12585): the pool over the union vocabulary, behind a gate.

The paper sums w_i p_i M_i with binary maps into the union of all vocabularies and lets a gate member whose top
probability exceeds a threshold decide alone. Output has to be main's tokens here, so the union is carried into
main's vocabulary by the direct map, which the sum does not mind: below the threshold this is the linear projection.

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


class GacOptions(BaseModel):
    """Options of the `gac` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate: str | None = Field(None, description="Member whose certainty opens the gate; main by default.")
    threshold: float = Field(0.5, ge=0.0, le=1.0, description="Above it the gate decides alone; 1: it never does.")


@FUSIONS.register("gac", GacOptions)
class GacFusion(TokenPool):
    """Linear pool with a gate; see the module."""

    name = "gac"

    def __init__(self, space: FusionSpace, options: GacOptions) -> None:
        super().__init__(space)
        self._gate = 0 if options.gate is None else space.index(options.gate, "gate")
        self._threshold = options.threshold

    def reweighted(self, support: ClosedSupport, candidates: Sequence[Candidates], weights: Tensor) -> Tensor:
        """All weight to the gate in rows where it is certain."""
        certain = candidates[self._gate].logprobs.amax(dim=1).exp() > self._threshold  # (B,)
        alone = torch.zeros_like(weights)
        alone[:, self._gate] = 1.0
        return torch.where(certain.unsqueeze(1), alone, weights)

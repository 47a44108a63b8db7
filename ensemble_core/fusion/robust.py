"""A pool that one misbehaving member cannot carry away: the weighted median of mapped shares, normalised.

For each token, and for the mass outside, the weighted median over members of p~_i (with equal weights the plain
median; between two it is their mean), scaled to sum to 1. A member below half of the weight moves a token's share no
further than to what some other member gives it, be it confident nonsense. Where the medians are 0 throughout (no
token is possible to half of the members) main decides alone.

With fewer than three members there is no majority, which is refused. Does not know how tokens are mapped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FUSIONS, Fused, FusionSpace
from ensemble_core.fusion.support import TokenSpace, concluded
from ensemble_core.members.base import Candidates

_ROUNDING = 1e-6  # cumulative weights this close to a half are a half


class RobustOptions(BaseModel):
    """The `robust` fusion has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@FUSIONS.register("robust", RobustOptions)
class RobustFusion:
    """Weighted median pool; see the module."""

    name = "robust"
    full_vocabulary = False

    def __init__(self, space: FusionSpace, options: RobustOptions) -> None:
        if len(space.vocabularies) < 3:
            raise ConfigError(
                f"fusion.name: 'robust' takes a median, which needs three members or more, got "
                f"{list(space.members)}; add members or choose another fusion"
            )
        self._space = TokenSpace(space)

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        support = self._space.support(candidates).heard(weights)
        shares = support.shares()
        middle = weighted_median(shares, weights)
        total = middle.sum(dim=1, keepdim=True)
        return concluded(support, torch.where(total == 0.0, shares[:, 0], middle / total))


def weighted_median(shares: Tensor, weights: Tensor) -> Tensor:
    """The weighted median over members: (B, M, X) shares, (B, M) weights whose rows sum to 1 -> (B, X).

    The mean of the lower and the upper median: they differ where some members hold exactly half of the weight.
    """
    ordered, order = shares.sort(dim=1)
    reached = weights.unsqueeze(2).expand_as(shares).gather(1, order).cumsum(dim=1)
    lower = (reached < 0.5 - _ROUNDING).sum(dim=1, keepdim=True)
    upper = (reached <= 0.5 + _ROUNDING).sum(dim=1, keepdim=True)
    last = shares.shape[1] - 1  # a row of weights that are not finite points past the end
    middle = ordered.gather(1, lower.clamp_max(last)) + ordered.gather(1, upper.clamp_max(last))
    return middle.squeeze(1) / 2

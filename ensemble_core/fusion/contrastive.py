"""Contrastive fusion with roles (DExperts, Liu et al. 2021, arXiv 2105.03023; proxy tuning, 2401.08565).

    log p = log p_main + alpha (log p~_expert - log p~_base), normalised over the closed support and main's tail

A large model is steered by what training changed in a small one: the expert is the changed model, the base the same
model before. A member may play two roles. Where the expert or the base has no token that maps to main's, and for
mass outside the support, nothing is known of the change and main's probability stands. What a member could have
named but has no candidate for counts with its floor (see `support`).

Weights have no meaning here: alpha is the one strength. Does not know how tokens are mapped, or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.errors import ConfigError
from ensemble_core.fusion.base import FUSIONS, Fused, FusionSpace
from ensemble_core.fusion.support import TokenSpace, concluded
from ensemble_core.members.base import Candidates

_SUPPOSED = 0.5  # of a tail: a ratio minds too small a floor more than a pool minds too large a one
_TINY = 1e-30  # what is impossible to expert or base, so that ratios stay finite


class ContrastiveOptions(BaseModel):
    """Options of the `contrastive` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: str = Field(description="Member whose preference is added.")
    base: str = Field(description="Member whose preference is taken away.")
    main: str | None = Field(None, description="Member that is steered; the ensemble's main by default.")
    alpha: float = Field(1.0, ge=0.0, le=10.0, description="Strength of the difference; 0: main alone.")


@FUSIONS.register("contrastive", ContrastiveOptions)
class ContrastiveFusion:
    """Main, moved by the difference of two members; see the module."""

    name = "contrastive"
    full_vocabulary = False

    def __init__(self, space: FusionSpace, options: ContrastiveOptions) -> None:
        self._main = 0 if options.main is None else space.index(options.main, "main")
        self._expert, self._base = space.index(options.expert, "expert"), space.index(options.base, "base")
        self._alpha = options.alpha
        self._space = TokenSpace(space, _SUPPOSED)
        _require_roles(space.members, {self._main, self._expert, self._base})

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`; weights are not used."""
        support = self._space.support(candidates)
        shares = support.shares()
        logs = shares.clamp_min(_TINY).log()
        change = logs[:, self._expert] - logs[:, self._base]  # (B, S + 1)
        named = support.nameable.has(self._expert) & support.nameable.has(self._base)
        change[:, :-1] = change[:, :-1].where(named, 0.0)
        change[:, -1] = 0.0
        steered = shares[:, self._main].log() + self._alpha * change
        return concluded(support, torch.softmax(steered, dim=1))


def _require_roles(members: tuple[str, ...], used: set[int]) -> None:
    """Everybody has a role, since nobody is asked for nothing. Main may be there for its vocabulary alone."""
    if idle := [name for i, name in enumerate(members) if i not in used | {0}]:
        raise ConfigError(
            f"fusion.options: members {idle} have no role; name them as main, expert or base, or leave them out of "
            "the ensemble"
        )

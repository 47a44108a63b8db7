"""CoRE: consistency as a wrapper over any fusion that pools linearly (arXiv 2510.13855).

Between the two stages of the base (see `Pooled`) the weighted sum is replaced. With p~_i member i's shares where all
meet (main's tokens, or anchors for `relative`), p* their plain mean, delta_i = |p~_i - p*| and s_i = f(delta_i):

- token level: an assistant's share of each place is scaled by its consistency s_i; main's is not.
- model level: a member's weight w_i is multiplied by m_i = sum_v s_i(v) / H(p~_i), H the entropy in nats.
- main holds at least `main_share` of the weight; the result is scaled to sum to 1.

`mode: entropy-only` is what the public code does for answers of one token: m_i = 1 / H(p~_i) and no filter. The mass
outside a closed support counts as one more place, in delta, in the sums and in H; with whole distributions it is
empty. Members whom the base has given no weight at this step (a filter, a gate) stay out of p* and have none here.

Does not know what the places are. A fusion without a linear pool is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from ensemble_core.errors import ConfigError, UnknownStrategyError
from ensemble_core.fusion.base import (
    FUSIONS,
    Fused,
    FusionSpace,
    Pooled,
    Views,
    build_fusion,
    linear_pool,
    pooled_names,
)
from ensemble_core.members.base import Candidates

_TINY = 1e-30
_SURE = 1e-6  # nats; the entropy of a member that is as good as certain


class BaseChoice(BaseModel):
    """The fusion that consistency is applied to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="Any fusion that pools linearly.")
    options: dict[str, Any] = Field(default_factory=dict, description="Its options.")


class CoreOptions(BaseModel):
    """Options of the `core` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: BaseChoice
    mode: Literal["filtered", "entropy-only"] = Field("filtered", description="entropy-only: m = 1/H, no filter.")
    level: Literal["token", "model", "both"] = Field("both", description="Where consistency counts.")
    function: Literal["rbf", "linear", "power", "reciprocal"] = Field("rbf", description="f: delta -> s.")
    beta: float = Field(2.0, gt=0.0, le=100.0, description="How fast rbf falls.")
    main_share: float = Field(0.5, ge=0.0, le=1.0, description="Least weight of main; 0: no such rule.")

    @field_validator("base")
    @classmethod
    def _base_pools(cls, base: BaseChoice) -> BaseChoice:
        try:
            options = FUSIONS.parse(base.name, base.options, "base")
        except (ConfigError, UnknownStrategyError) as error:
            raise ValueError(str(error)) from error
        if base.name not in pooled_names() or getattr(options, "pool", "linear") != "linear":
            raise ValueError(f"{base.name} with {base.options} has no linear pool; allowed are {pooled_names()}")
        # Defaults are spelt out, so that equal options are equal however a request words them.
        return base.model_copy(update={"options": options.model_dump(mode="json")})

    @field_validator("level", "function", "beta")
    @classmethod
    def _counts(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("mode") == "entropy-only":
            raise ValueError("has no meaning in mode entropy-only; leave it out")
        if info.field_name == "beta" and info.data.get("function", "rbf") != "rbf":
            raise ValueError("belongs to function rbf; leave it out")
        return value


@FUSIONS.register("core", CoreOptions)
class CoreFusion:
    """Consistency over a base fusion; see the module."""

    name = "core"

    def __init__(self, space: FusionSpace, options: CoreOptions) -> None:
        base = options.base
        self._base = cast(Pooled, build_fusion(base.name, FUSIONS.parse(base.name, base.options, "base"), space))
        self._options = options
        self.full_vocabulary = self._base.full_vocabulary

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        views = self._base.views(candidates, weights)
        return self._base.conclude(views, self._pool(views))

    def _pool(self, views: Views) -> Tensor:
        """The consistent sum of shares, (B, X), rows sum to 1."""
        options, kept = self._options, views.shares
        quality = torch.ones_like(views.weights)
        if options.mode == "entropy-only":
            quality = 1.0 / entropy(kept)
        else:
            s = consistency(views, _function(options))
            if options.level != "token":
                quality = s.sum(dim=2) / entropy(kept)
            if options.level != "model":
                kept = torch.cat([kept[:, :1], kept[:, 1:] * s[:, 1:]], dim=1)
        weights = held(views.weights * quality, options.main_share)
        pooled = linear_pool(weights, kept)
        total = pooled.sum(dim=1, keepdim=True)
        return torch.where(total == 0.0, views.shares[:, 0], pooled / total)


def consistency(views: Views, function: Callable[[Tensor], Tensor]) -> Tensor:
    """s_i = f(|p~_i - p*|), (B, M, X); 0 on padding. p* is the mean over members with any weight."""
    present = (views.weights > 0).float()
    mean = linear_pool(present / present.sum(dim=1, keepdim=True), views.shares)
    s = function((views.shares - mean.unsqueeze(1)).abs())
    return s.masked_fill_((views.shares == 0.0).all(dim=1, keepdim=True), 0.0)


def entropy(shares: Tensor) -> Tensor:
    """H of each member's shares in nats, (B, M, X) -> (B, M), no less than that of a member that is all but sure."""
    return (-shares * shares.clamp_min(_TINY).log()).sum(dim=2).clamp_min(_SURE)


def held(weights: Tensor, main_share: float) -> Tensor:
    """Weights (B, M) scaled to sum to 1, with at least `main_share` of them main's where main has any."""
    weights = weights / weights.sum(dim=1, keepdim=True)
    main = weights[:, :1]
    raised = torch.where(main > 0, main.clamp_min(main_share), main)
    others = weights[:, 1:] * ((1.0 - raised) / (1.0 - main).clamp_min(_TINY))
    return torch.cat([raised, others], dim=1)


def _function(options: CoreOptions) -> Callable[[Tensor], Tensor]:
    """delta -> s on [0, 1], falling from f(0) = 1."""
    beta, floor = options.beta, math.exp(-options.beta)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "rbf": lambda delta: ((-beta * delta).exp() - floor) / (1.0 - floor),
        "linear": lambda delta: 1.0 - delta,
        "power": lambda delta: (1.0 - delta) ** 5,
        "reciprocal": lambda delta: 1.0 / (1.0 + delta),
    }
    return functions[options.function]

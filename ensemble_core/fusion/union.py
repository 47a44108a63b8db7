"""UniTE (Yao et al. 2024, arXiv 2410.03777): members meet on the union of their likeliest tokens alone.

The union is of each member's top n tokens, in main's vocabulary (tokens that map to one of main's join). A token that
a member lacks gets the probability of the member's own first sub-token for it. Each member's probabilities are scaled
to sum to 1 on the union (the softmax of its logits there), and the weighted mean is taken.

The paper stops there (`rest: none`), so any other token is impossible. By default main's mass outside the union stays
main's, and the union shares what main gives it as a whole: the choice within the union is the paper's, other tokens
keep a finite log-probability, and identical members are one. Does not know how tokens are mapped, or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import FUSIONS, FusionSpace, Views
from ensemble_core.fusion.mapping import token_map
from ensemble_core.fusion.support import TokenPool, floor_of
from ensemble_core.members.base import Candidates
from ensemble_core.members.ranking import ranked


class UnionOptions(BaseModel):
    """Options of the `union` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: int = Field(10, ge=1, le=1000, description="Tokens that each member brings into the union.")
    rest: Literal["main", "none"] = Field(
        "main", description="Outside the union: main: as main has it. none: impossible, as in the paper."
    )


@FUSIONS.register("union", UnionOptions)
class UnionFusion(TokenPool):
    """Linear pool on the union of top tokens; see the module."""

    name = "union"

    def __init__(self, space: FusionSpace, options: UnionOptions) -> None:
        super().__init__(space)
        main, *assistants = space.vocabularies
        self._first_tokens = [token_map(main, vocabulary).to(space.device) for vocabulary in assistants]
        self._options = options

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """See `Pooled.views`; what lies outside the union is the same for all members."""
        views = super().views(candidates, weights)
        inside = views.shares[:, :, :-1]
        union = _union(inside, self._options.top).unsqueeze(1)  # (B, 1, S)
        scores = torch.where(union, self._scores(views, candidates), 0.0)
        scores = scores / scores.sum(dim=2, keepdim=True)
        if self._options.rest == "none":
            return replace(views, shares=torch.nn.functional.pad(scores, (0, 1)))
        main = inside[:, :1]
        held = torch.where(union, main, 0.0).sum(dim=2, keepdim=True)  # (B, 1, 1)
        shares = torch.where(union, scores * held, main)
        outside = views.shares[:, :1, -1:].expand(-1, shares.shape[1], -1)
        return replace(views, shares=torch.cat([shares, outside], dim=2))

    def _scores(self, views: Views, candidates: Sequence[Candidates]) -> Tensor:
        """(B, M, S): shares, and where a member lacks the token that of its own first sub-token."""
        inside = views.shares[:, :, :-1]
        left = views.unmapped[:, 1:, None] * inside[:, :1]  # what members without words leave to main
        firsts = [
            probability_of(part, firsts[views.token_ids])
            for part, firsts in zip(candidates[1:], self._first_tokens, strict=True)
        ]
        lacked = torch.stack([inside[:, 0], *(first + left[:, i] for i, first in enumerate(firsts))], dim=1)
        return torch.where(self._space.can_name(views.token_ids), inside, lacked)


def probability_of(candidates: Candidates, token_ids: Tensor) -> Tensor:
    """A member's probability of its own ids (B, S); its floor for one that is no candidate, 0 for an id of -1."""
    known, order = candidates.token_ids.sort(dim=1)
    place = torch.searchsorted(known, token_ids).clamp_max(known.shape[1] - 1)
    probs = candidates.logprobs.gather(1, order.gather(1, place)).exp()
    floor = floor_of(candidates, torch.ones_like(candidates.tail)).unsqueeze(1)
    found = torch.where(known.gather(1, place) == token_ids, probs, floor)
    return torch.where(token_ids < 0, 0.0, found)


def _union(inside: Tensor, num_top: int) -> Tensor:
    """Which places some member has among its top: (B, M, S) -> (B, S) bool."""
    best = ranked(inside, num_top)
    marked = torch.zeros_like(inside, dtype=torch.bool).scatter_(2, best, inside.gather(2, best) > 0)
    return marked.any(dim=1)

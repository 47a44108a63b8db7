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
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import FUSIONS, Fused, FusionSpace, Views, linear_pool
from ensemble_core.fusion.mapping import token_map
from ensemble_core.fusion.support import ClosedSupport, TokenPool, concluded, floor_of
from ensemble_core.members.base import Candidates


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

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`. Linear in M but for the union itself, whose M n places every member has scores for."""
        support, weights = self.heard(candidates, weights)
        union, scores, outside = self._met(support, candidates)
        return concluded(support, _put(outside, union, linear_pool(weights, scores)))

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """See `Pooled.views`; what lies outside the union is the same for all members."""
        support, weights = self.heard(candidates, weights)
        union, scores, outside = self._met(support, candidates)
        shares = torch.stack([_put(outside, union, own) for own in scores.unbind(1)], dim=1)
        return Views(candidates[0], support.token_ids, shares, weights, support.unmapped)

    def _met(self, support: ClosedSupport, candidates: Sequence[Candidates]) -> tuple[Tensor, Tensor, Tensor]:
        """The union's places (B, U), S + 1 for none; shares there (B, M, U); and shares elsewhere (B, S + 1)."""
        inside, num_places = support.inside(), support.token_ids.shape[1]
        places, there = _union(support.top(self._options.top, inside), num_places)
        shares = [each.gather(1, places) for each in inside]
        scores = torch.where(there.unsqueeze(1), self._scores(support, candidates, places, shares), 0.0)
        scores = scores / scores.sum(dim=2, keepdim=True)
        union = torch.where(there, places, num_places + 1)
        main = support.shares_of_main()
        if self._options.rest == "none":
            return union, scores, torch.zeros_like(main)
        held = main.gather(1, places).where(there, 0.0).sum(dim=1)  # (B,)
        return union, scores * held[:, None, None], main

    def _scores(
        self, support: ClosedSupport, candidates: Sequence[Candidates], places: Tensor, shares: list[Tensor]
    ) -> Tensor:
        """Shares (M of (B, U)), and where a member lacks the token that of its own first sub-token, (B, M, U)."""
        token_ids = support.token_ids.gather(1, places)
        nameable = support.nameable.at(places)
        scores = [shares[0]]
        for member, firsts in enumerate(self._first_tokens, start=1):
            left = support.unmapped[:, member : member + 1] * shares[0]  # what members without words leave to main
            lacked = probability_of(candidates[member], firsts[token_ids]) + left
            scores.append(torch.where(nameable.has(member), shares[member], lacked))
        return torch.stack(scores, dim=1)


def probability_of(candidates: Candidates, token_ids: Tensor) -> Tensor:
    """A member's probability of its own ids (B, S); its floor for one that is no candidate, 0 for an id of -1."""
    known, order = candidates.token_ids.sort(dim=1)
    place = torch.searchsorted(known, token_ids).clamp_max(known.shape[1] - 1)
    probs = candidates.logprobs.gather(1, order.gather(1, place)).exp()
    floor = floor_of(candidates, torch.ones_like(candidates.tail)).unsqueeze(1)
    found = torch.where(known.gather(1, place) == token_ids, probs, floor)
    return torch.where(token_ids < 0, 0.0, found)


def _union(top: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
    """Each place once: (B, M, n), `num_places` for none -> (B, M n) places, and which of these count."""
    places = top.flatten(1).sort(dim=1).values
    there = places < num_places
    there[:, 1:] &= places[:, 1:] != places[:, :-1]
    return places.clamp_max(num_places - 1), there


def _put(shares: Tensor, places: Tensor, own: Tensor) -> Tensor:
    """Shares (B, X) with others (B, U) put at places (B, U); X for none."""
    padded = torch.nn.functional.pad(shares, (0, 1))
    return padded.scatter_(1, places, own)[:, :-1]

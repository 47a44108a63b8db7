"""Members' candidates in main's vocabulary: the closed support, and each member's shares on it.

The support of a row is the union of main's candidates and of what the assistants' candidates map to, and one more
place for all the mass outside. What is known is exact; what is not is treated so:

- A token that a member could have named but has no candidate for has a mass that is unknown but bounded by the
  member's least candidate. That bound is taken, out of the tail; all such tokens together take a sixteenth of it at
  most, since other tokens have a part in it, too.
- The rest of an assistant's tail lies outside, like main's.
- Mass of an assistant on tokens without a place (control tokens) is left to main: it is spread as main's own.

Invariants: a member's shares sum to 1, the place outside included; with whole distributions (K = V) all is exact;
rows do not touch each other; a pool in which main has all the weight is main, its tail included. Does not know how
shares are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ensemble_core.fusion.base import Fused, FusionSpace, Views, linear_pool
from ensemble_core.fusion.mapping import UNMAPPED, token_map
from ensemble_core.members.base import Candidates

_BEYOND = torch.iinfo(torch.int64).max  # sorts after every id
SUPPOSED = 1 / 16  # of a tail; chosen on even documents, see docs/methods.md


class TokenSpace:
    """Main's vocabulary as the place where members meet.

    supposed: the most that all tokens which a member could have named, but did not, take of its tail.
    """

    def __init__(self, space: FusionSpace, supposed: float = SUPPOSED) -> None:
        self._supposed = supposed
        main, *assistants = space.vocabularies
        self._maps = [token_map(vocabulary, main).to(space.device) for vocabulary in assistants]
        self._named = [_named(places, len(main)) for places in self._maps]

    def mapped_ids(self, candidates: Sequence[Candidates]) -> list[Tensor]:
        """Each member's candidates as main's ids, M of (B, K) int64; -1 for those without a place."""
        main, *others = candidates
        pairs = zip(others, self._maps, strict=True)
        return [main.token_ids, *(places[part.token_ids] for part, places in pairs)]

    def can_name(self, token_ids: Tensor) -> Tensor:
        """Whether each member has a token that maps to main's ids: (B, S) -> (B, M, S) bool."""
        others = [named[token_ids] for named in self._named]
        return torch.stack([torch.ones_like(token_ids, dtype=torch.bool), *others], dim=1)

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """Every member's shares on the closed support, float32."""
        return self.attributed(candidates, weights)[0]

    def attributed(self, candidates: Sequence[Candidates], weights: Tensor) -> tuple[Views, Tensor]:
        """`views`, and whose candidates brought each place, (B, M, S) bool."""
        ids = self.mapped_ids(candidates)
        token_ids, present, places = closed_support(ids)
        masses = [part.logprobs.exp() for part in candidates]
        known = torch.stack(
            [
                torch.zeros_like(token_ids, dtype=mass.dtype).scatter_add_(1, place, mass.where(own >= 0, 0.0))
                for own, mass, place in zip(ids, masses, places, strict=True)
            ],
            dim=1,
        )
        unmapped = torch.stack(
            [mass.where(own < 0, 0.0).sum(dim=1) for own, mass in zip(ids, masses, strict=True)], dim=1
        )
        lacking = (known == 0.0) & self.can_name(token_ids) & present.unsqueeze(1)
        shares = _filled(known, lacking, candidates, self._supposed)
        shares = shares + unmapped.unsqueeze(2) * shares[:, :1]
        return Views(candidates[0], token_ids, shares, weights, unmapped), known > 0.0


class TokenPool:
    """A linear pool of shares on the closed support; those that gate or filter members override `reweighted`."""

    full_vocabulary = False

    def __init__(self, space: FusionSpace) -> None:
        self._space = TokenSpace(space)

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        views = self.views(candidates, weights)
        return self.conclude(views, linear_pool(views))

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """See `Pooled.views`."""
        views, brought = self._space.attributed(candidates, weights)
        return heard(replace(views, weights=self.reweighted(views, candidates)), brought)

    def conclude(self, views: Views, pooled: Tensor) -> Fused:
        """See `Pooled.conclude`."""
        return concluded(views, pooled)

    def reweighted(self, views: Views, candidates: Sequence[Candidates]) -> Tensor:
        """The weights that count at this step, (B, M), rows sum to 1; unchanged unless overridden."""
        return views.weights


def closed_support(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The union of M members' ids, row by row.

    ids: M of (B, K), -1 for none; main's are never -1. Returns token_ids (B, S) in ascending order, S being the sum
    of all K, padded at the end with the row's first id; which entries are no padding (B, S) bool; and where each
    given id stands, M of (B, K) (an id of -1: anywhere).
    """
    joined = torch.cat(list(ids), dim=1)
    ordered, order = torch.where(joined < 0, _BEYOND, joined).sort(dim=1)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = fresh.cumsum(dim=1) - 1
    token_ids = torch.full_like(ordered, _BEYOND).scatter_(1, rank, ordered)
    present = token_ids != _BEYOND
    places = torch.empty_like(rank).scatter_(1, order, rank)
    return (
        torch.where(present, token_ids, token_ids[:, :1]),
        present,
        list(torch.split(places, [own.shape[1] for own in ids], dim=1)),
    )


def heard(views: Views, brought: Tensor) -> Views:
    """Views without the places that only members without weight brought: they lie outside, as if never named.

    brought: (B, M, S) bool, whose candidates brought each place. What main brought stays whatever its weight.
    """
    speaks = views.weights > 0
    speaks[:, 0] = True
    kept = (brought & speaks.unsqueeze(2)).any(dim=1)  # (B, S)
    lost = torch.nn.functional.pad(~kept, (0, 1)).unsqueeze(1)  # (B, 1, S + 1)
    shares = views.shares.masked_fill(lost, 0.0)
    shares[:, :, -1] += views.shares.where(lost, 0.0).sum(dim=2)
    token_ids = torch.where(kept, views.token_ids, views.main.token_ids[:, :1])
    return replace(views, token_ids=token_ids, shares=shares)


def floor_of(candidates: Candidates, num_lacking: Tensor, supposed: float = SUPPOSED) -> Tensor:
    """What is supposed of each of `num_lacking` (B,) tokens outside a member's candidates, (B,).

    The last eighth of a row does not count as least, since ids asked for by `also` stand there whatever their rank.
    """
    num = candidates.logprobs.shape[1]
    least = candidates.logprobs[:, : num - num // 8].amin(dim=1).exp()
    return torch.minimum(least, supposed * candidates.tail.exp() / num_lacking.clamp_min(1))


def concluded(views: Views, pooled: Tensor) -> Fused:
    """Pooled shares on a closed support (B, S + 1) as a distribution."""
    logprobs = pooled.log()
    return Fused(views.token_ids, logprobs[:, :-1], logprobs[:, -1], views.unmapped)


def _filled(known: Tensor, lacking: Tensor, candidates: Sequence[Candidates], supposed: float) -> Tensor:
    """Known mass (B, M, S) with floors where it is lacking and the rest of the tail behind: (B, M, S + 1)."""
    counts = lacking.sum(dim=2)  # (B, M)
    floors = torch.stack([floor_of(c, counts[:, i], supposed) for i, c in enumerate(candidates)], dim=1)
    tails = torch.stack([c.tail.exp() for c in candidates], dim=1)
    rest = (tails - floors * counts).clamp_min(0.0)
    filled = torch.where(lacking, floors.unsqueeze(2), known)
    return torch.cat([filled, rest.unsqueeze(2)], dim=2)


def _named(places: Tensor, size: int) -> Tensor:
    """(V_main,) bool: main's ids that some token maps to."""
    named = torch.zeros(size, dtype=torch.bool, device=places.device)
    named[places[places != UNMAPPED]] = True
    return named

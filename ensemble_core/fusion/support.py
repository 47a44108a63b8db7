"""Members' candidates in main's vocabulary: the closed support, and each member's shares on it.

The support of a row is the union of main's candidates and of what the assistants' candidates map to, and one more
place for all the mass outside. What is known is exact; what is not is treated so:

- A token that a member could have named but has no candidate for has a mass that is unknown but bounded by the
  member's least candidate. That bound is taken, out of the tail; all such tokens together take a sixteenth of it at
  most, since other tokens have a part in it, too.
- The rest of an assistant's tail lies outside, like main's.
- Mass of an assistant on tokens without a place (control tokens) is left to main: it is spread as main's own.

Invariants: a member's shares sum to 1, the place outside included; with whole distributions (K = V) all is exact;
rows do not touch each other; a pool in which main has all the weight is main, its tail included.

Cost: S, the number of places, is the sum of all members' K. A share for each member and each place would be M S
numbers, which grows with the square of M. But away from its own K candidates a member has one number, its floor. So
`ClosedSupport` keeps candidates and floors, and `pooled` takes time linear in M. What members say of each place is
written out (`inside`, `shares`) only for fusions that compare it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_core.fusion.base import Fused, FusionSpace, Views
from ensemble_core.fusion.mapping import UNMAPPED, token_map
from ensemble_core.fusion.member_sets import MemberSets
from ensemble_core.members.base import Candidates
from ensemble_core.members.ranking import ranked

SUPPOSED = 1 / 16  # of a tail; chosen on even documents, see docs/methods.md


@dataclass(frozen=True, slots=True)
class ClosedSupport:
    """One batch's support, and what each of M members says of its S places and of the mass outside.

    A member's share of a place is the mass of its candidates there, or its floor where it lacks one; on top of that
    comes what it leaves to main.
    """

    token_ids: Tensor  # (B, S) int64, main's ids
    places: list[Tensor]  # M of (B, K) int64: where each candidate stands
    masses: list[Tensor]  # M of (B, K) float32: what it brings there; 0 for one without a place
    nameable: MemberSets  # (B, S) who has a token that maps to the place; nobody at padding
    named: MemberSets  # (B, S) whose candidates bring mass
    lacking: MemberSets  # (B, S) who could have named the place and did not
    floors: Tensor  # (B, M) float32, the share of each place that a member lacks
    rest: Tensor  # (B, M) float32, a member's mass outside
    unmapped: Tensor  # (B, M) float32, a member's mass without a place, left to main
    kept: Tensor | None = None  # (B, S) bool: see `heard`

    def heard(self, weights: Tensor) -> ClosedSupport:
        """Without the places that only members without weight brought: they lie outside, as if never named.

        weights: (B, M). What main brought stays whatever its weight. A lost place repeats the row's first id.
        """
        speaks = weights > 0
        speaks[:, 0] = True
        kept = self.named.meets(speaks)
        first = self.token_ids.gather(1, self.places[0][:, :1])
        return replace(self, token_ids=torch.where(kept, self.token_ids, first), kept=kept)

    def pooled(self, weights: Tensor) -> Tensor:
        """The weighted sum of all members' shares, (B, M) -> (B, S + 1). Linear in M."""
        left = (weights * self.unmapped).sum(dim=1, keepdim=True)
        weights = torch.cat([weights[:, :1] + left, weights[:, 1:]], dim=1)
        outside = (weights * self.rest).sum(dim=1, keepdim=True)
        pooled = self.lacking.sums(weights * self.floors)
        for places, masses, weight in zip(self.places, self.masses, torch.split(weights, 1, dim=1), strict=True):
            pooled.scatter_add_(1, places, masses * weight)
        return self._gathered(pooled, outside)

    def inside(self) -> list[Tensor]:
        """Every member's share of every place, M of (B, S), those of lost places, too. A pass a member over S."""
        main = self._own(0)
        unmapped = torch.split(self.unmapped, 1, dim=1)
        return [main, *(self._own(i).addcmul_(unmapped[i], main) for i in range(1, len(self.places)))]

    def shares(self) -> Tensor:
        """Every member's share of every place and of the outside, (B, M, S + 1)."""
        outside = self.rest + self.unmapped * self.rest[:, :1]
        return self._gathered(torch.stack(self.inside(), dim=1), outside.unsqueeze(2))

    def shares_of_main(self) -> Tensor:
        """Main's share of every place and of the outside, (B, S + 1)."""
        return self._gathered(self._own(0), self.rest[:, :1])

    def top(self, num: int, inside: list[Tensor]) -> Tensor:
        """The `num` places of largest share for each member, largest first, (B, M, num); S where there is none.

        inside: of this support. A member's are looked for among what it or main named: elsewhere a share is nothing
        but supposed.
        """
        found = []
        for member, shares in enumerate(inside):
            places = torch.cat([self.places[member], self.places[0]], dim=1) if member else self.places[0]
            own = shares.gather(1, places)
            if member:
                own = own.masked_fill_(_repeated(places, shares.shape[1]), 0.0)
            if self.kept is not None:
                own = own * self.kept.gather(1, places)
            best = ranked(own, num, places)
            top = torch.where(own.gather(1, best) > 0.0, places.gather(1, best), shares.shape[1])
            found.append(torch.nn.functional.pad(top, (0, num - best.shape[1]), value=shares.shape[1]))
        return torch.stack(found, dim=1)

    def _gathered(self, inside: Tensor, outside: Tensor) -> Tensor:
        """Shares of places (B, ..., S) and of the outside (B, ..., 1) as one, lost places laid outside."""
        if self.kept is not None:
            kept = self.kept if inside.ndim == 2 else self.kept.unsqueeze(1)
            outside = outside + torch.where(kept, 0.0, inside).sum(dim=-1, keepdim=True)
            inside = torch.where(kept, inside, 0.0)
        return torch.cat([inside, outside], dim=-1)

    def _own(self, member: int) -> Tensor:
        """A member's shares of places without what it leaves to main, (B, S)."""
        known = torch.zeros_like(self.token_ids, dtype=torch.float32)
        known.scatter_add_(1, self.places[member], self.masses[member])
        return torch.where(self.lacking.has(member), self.floors[:, member : member + 1], known)


class TokenSpace:
    """Main's vocabulary as the place where members meet.

    supposed: the most that all tokens which a member could have named, but did not, take of its tail.
    """

    def __init__(self, space: FusionSpace, supposed: float = SUPPOSED) -> None:
        self._supposed = supposed
        main, *assistants = space.vocabularies
        self._size = len(main)
        self._maps = [token_map(vocabulary, main).to(space.device) for vocabulary in assistants]
        every = torch.ones(1, len(main), dtype=torch.bool, device=space.device)
        self._nameable = MemberSets.of_flags([every, *(_nameable(places, len(main)) for places in self._maps)])

    def support(self, candidates: Sequence[Candidates]) -> ClosedSupport:
        """The support of candidates of B rows, main first; float32."""
        ids = self._mapped_ids(candidates)
        token_ids, present, places = closed_support(ids, self._size)
        masses = [part.logprobs.exp() for part in candidates]
        pairs = zip(ids[1:], masses[1:], strict=True)
        placed = [masses[0], *(mass.where(own >= 0, 0.0) for own, mass in pairs)]
        named = _named(places, placed, token_ids.shape[1])
        nameable = self._nameable.at(token_ids).where(present)
        lacking = nameable.without(named)
        counts = lacking.counts()
        tails = torch.stack([part.tail for part in candidates], dim=1).exp()
        floors = floors_of(candidates, tails, counts, self._supposed)
        unplaced = [(mass - own).sum(dim=1) for mass, own in zip(masses[1:], placed[1:], strict=True)]
        return ClosedSupport(
            token_ids=token_ids,
            places=places,
            masses=placed,
            nameable=nameable,
            named=named,
            lacking=lacking,
            floors=floors,
            rest=(tails - floors * counts).clamp_min(0.0),
            unmapped=torch.stack([torch.zeros_like(tails[:, 0]), *unplaced], dim=1),
        )

    def carried(self, member: int, token_ids: Tensor) -> Tensor:
        """Main's ids for an assistant's, (B,) -> (B,); -1 for none. member: its index, main being 0."""
        return self._maps[member - 1].to(token_ids.device)[token_ids]

    def _mapped_ids(self, candidates: Sequence[Candidates]) -> list[Tensor]:
        """Each member's candidates as main's ids, M of (B, K) int64; -1 for those without a place."""
        main, *others = candidates
        pairs = zip(others, self._maps, strict=True)
        return [main.token_ids, *(_at(places, part.token_ids) for part, places in pairs)]


class TokenPool:
    """A linear pool of shares on the closed support; those that gate or filter members override `reweighted`."""

    full_vocabulary = False

    def __init__(self, space: FusionSpace) -> None:
        self._space = TokenSpace(space)

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`."""
        support, weights = self.heard(candidates, weights)
        return concluded(support, support.pooled(weights))

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """See `Pooled.views`."""
        support, weights = self.heard(candidates, weights)
        return Views(candidates[0], support.token_ids, support.shares(), weights, support.unmapped)

    def conclude(self, views: Views, pooled: Tensor) -> Fused:
        """See `Pooled.conclude`."""
        return concluded(views, pooled)

    def heard(self, candidates: Sequence[Candidates], weights: Tensor) -> tuple[ClosedSupport, Tensor]:
        """The support that members with weight leave, and the weights that count at this step."""
        support = self._space.support(candidates)
        weights = self.reweighted(support, candidates, weights)
        return support.heard(weights), weights

    def reweighted(self, support: ClosedSupport, candidates: Sequence[Candidates], weights: Tensor) -> Tensor:
        """The weights that count at this step, (B, M), rows sum to 1; unchanged unless overridden."""
        return weights


def closed_support(ids: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The union of M members' ids, row by row.

    ids: M of (B, K), below `size`, -1 for none; main's are never -1. Returns token_ids (B, S) in ascending order, S
    being the sum of all K whatever the rows (so that rows do not touch each other), padded at the end with the row's
    first id; which entries are no padding (B, S) bool; and where each given id stands, M of (B, K) (an id of -1:
    anywhere).
    """
    joined = torch.cat(list(ids), dim=1)
    starts = torch.arange(0, len(joined) * (size + 1), size + 1, device=joined.device).unsqueeze(1)
    # All rows in one: on CPU that is a radix sort, which takes half the time, and no more than linear time.
    keys, order = (torch.where(joined < 0, size, joined) + starts).flatten().sort()
    ordered = keys.view_as(joined) - starts
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=fresh[:, 1:])
    rank = fresh.cumsum(dim=1).sub_(1)
    token_ids = torch.full_like(ordered, size).scatter_(1, rank, ordered)
    present = token_ids < size
    places = torch.empty_like(order).scatter_(0, order, rank.flatten()).view_as(joined)
    return (
        torch.where(present, token_ids, token_ids[:, :1]),
        present,
        list(torch.split(places, [own.shape[1] for own in ids], dim=1)),
    )


def floor_of(candidates: Candidates, num_lacking: Tensor) -> Tensor:
    """What is supposed of each of `num_lacking` (B,) tokens outside a member's candidates, (B,)."""
    return floors_of([candidates], candidates.tail.exp().unsqueeze(1), num_lacking.unsqueeze(1)).squeeze(1)


def floors_of(
    candidates: Sequence[Candidates], tails: Tensor, num_lacking: Tensor, supposed: float = SUPPOSED
) -> Tensor:
    """What is supposed of each token outside its candidates, for M members: (B, M) tails and counts -> (B, M)."""
    least = torch.stack([least_of(part) for part in candidates], dim=1).exp()
    return torch.minimum(least, supposed * tails / num_lacking.clamp_min(1))


def least_of(candidates: Candidates) -> Tensor:
    """The log-probability of each row's least candidate, (B,).

    The last eighth of a row does not count, since ids asked for by `also` stand there whatever their rank.
    """
    num = candidates.logprobs.shape[1]
    return candidates.logprobs[:, : num - num // 8].amin(dim=1)


def concluded(support: ClosedSupport | Views, pooled: Tensor) -> Fused:
    """Pooled shares on a closed support (B, S + 1) as a distribution."""
    impossible = pooled == 0.0  # places that repeat; on CPU the logarithm of 0 takes eight times as long
    logprobs = torch.where(impossible, -torch.inf, torch.where(impossible, 1.0, pooled).log_())
    return Fused(support.token_ids, logprobs[:, :-1], logprobs[:, -1], support.unmapped)


def _at(table: Tensor, token_ids: Tensor) -> Tensor:
    """Entries of a table (V,) for ids (B, K): a third of the time of `table[token_ids]`."""
    return table.expand(len(token_ids), -1).gather(1, token_ids)


def _repeated(places: Tensor, num_places: int) -> Tensor:
    """All but one of the entries of each place of a row, (B, P) -> (B, P) bool."""
    column = torch.arange(places.shape[1], device=places.device).expand_as(places)
    one = torch.empty(len(places), num_places, dtype=torch.long, device=places.device)  # read where it was written
    return one.scatter_(1, places, column).gather(1, places) != column


def _named(places: Sequence[Tensor], masses: Sequence[Tensor], num_places: int) -> MemberSets:
    """Whose candidates bring mass to each place, (B, S)."""
    bringing = (torch.where(mass > 0.0, own, num_places) for own, mass in zip(places, masses, strict=True))
    return MemberSets.of_places(bringing, num_places)


def _nameable(places: Tensor, size: int) -> Tensor:
    """(1, V_main) bool: main's ids that some token maps to."""
    nameable = torch.zeros(1, size, dtype=torch.bool, device=places.device)
    nameable[0, places[places != UNMAPPED]] = True
    return nameable

"""Any fusion, with any weights and options, over stored scores: no model runs.

Main's tokens are counted, all of them: fused where every member of the recipe has a token boundary (a shared
position), main's own elsewhere. So members and ensembles are compared over the same bytes.

A true token outside the fused support gets p_main(true) * fused tail / main's tail, its part of what the fusion
leaves outside; the parts of all such tokens sum to the fused tail at most. A fusion that leaves a true token less
than 1e-4 of main's own probability is charged that much, so that a mean stays finite, and the case is counted
(`ruled_out`).

Knows stored scores and fusions; does not know tasks, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.sampler import greedy
from ensemble_core.decoding.weights import weights_at
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.scores import MemberScores, Scores
from ensemble_core.fusion.base import Fused
from ensemble_core.members.base import Candidates
from ensemble_core.text.vocabulary import Vocabulary

BLOCK = 16  # positions fused at once: more rows of all anchors fall out of the cache (1.9 against 3.3 ms at 64)
_FLOOR = math.log(1e-4)


@dataclass(frozen=True, slots=True)
class SharedPositions:
    """Where every member of a recipe has a boundary. slots: where each member's candidates are, main first."""

    rows: Tensor  # (P,) int64, main's
    slots: Sequence[Tensor]  # M of (P,) int64

    def spread(self, num: int) -> SharedPositions:
        """At most `num` of them, evenly spread."""
        if len(self.rows) <= num:
            return self
        kept = torch.linspace(0, len(self.rows) - 1, num).long()
        return SharedPositions(self.rows[kept], [slots[kept] for slots in self.slots])


@dataclass(frozen=True, slots=True)
class FusedPositions:
    """What a fusion made of P shared positions."""

    logprobs: Tensor  # (P,) float32, of main's true next token
    top: Tensor  # (P,) int64, the fused distribution's likeliest id
    unmapped: Tensor  # (P, M) float32
    ruled_out: Tensor  # (P,) bool


@dataclass(frozen=True, slots=True)
class DocumentSums:
    """Sums over each document's positions, float64; the shared ones are of scored tokens alone."""

    bits: Tensor  # (D,) over all of main's scored tokens
    num_bytes: Tensor  # (D,)
    positions: Tensor  # (D,) shared
    shared_nats: Tensor  # (D,) at shared positions, fused
    main_nats: Tensor  # (D,) at shared positions, main alone
    overruled: Tensor  # (D,) shared positions whose likeliest token is not main's
    agreed: Mapping[str, Tensor]  # assistant -> (D,) its likeliest token spells the fused one
    unmapped: Mapping[str, Tensor]  # member -> (D,) mass
    ruled_out: Tensor  # (D,)


def shared_positions(scores: Scores, members: Sequence[str]) -> SharedPositions:
    """The places at which all of `members` (main first) answered."""
    main = scores.members[members[0]]
    rows = (main.slot >= 0).nonzero().squeeze(1)
    found = [main.slot[rows].long()]
    for member in members[1:]:
        slots = _slots_at(scores.members[member], main.places[rows])
        kept = slots >= 0
        rows, found = rows[kept], [slot[kept] for slot in (*found, slots)]
    return SharedPositions(rows, found)


def _slots_at(part: MemberScores, places: Tensor) -> Tensor:
    """Where a member's candidates for each place (P,) are; -1 where it has none."""
    met = part.slot >= 0
    own, order = part.places[met].sort()
    if not len(own):
        return torch.full_like(places, -1)
    at = torch.searchsorted(own, places).clamp_max(len(own) - 1)
    return torch.where(own[at] == places, part.slot[met].long()[order][at], -1)


def fuse_positions(
    scores: Scores,
    recipe: Recipe,
    shared: SharedPositions,
    num_candidates: int,
    weights: Sequence[float] | None = None,
) -> FusedPositions:
    """Fuse every shared position, block by block.

    num_candidates: K, at most what is stored. weights: main first, in place of the recipe's. Raises EvaluationError.
    """
    if num_candidates > scores.num_candidates:
        raise EvaluationError(
            f"scheduler.num_candidates is {num_candidates}, the stored scores hold {scores.num_candidates}; "
            "collect them anew"
        )
    fusion = recipe.fusion
    assert fusion is not None
    if fusion.full_vocabulary:
        raise EvaluationError(
            f"model {recipe.model!r}: a fusion of whole vocabularies cannot be evaluated on candidates; ask for "
            "`support: closed`"
        )
    if recipe.tau is not None:
        raise EvaluationError(
            f"model {recipe.model!r}: its weights follow each prompt's perplexity, and a document has none; name "
            "it for completions alone (--measure score), or ask for `?weighting.by=fixed`"
        )
    if weights is not None:
        recipe = replace(recipe, weights=tuple(weights))
    main, found = scores.members[recipe.main], list[FusedPositions]()
    for start in range(0, len(shared.rows), BLOCK):
        block = slice(start, start + BLOCK)
        parts = candidates_at(scores, recipe.members, shared, block, num_candidates)
        with torch.inference_mode():
            fused = fusion.fuse(parts, weights_at([recipe] * len(parts[0]), parts))
        rows = shared.rows[block]
        found.append(_judged(fused, parts[0], main.token[rows].long(), main.logprob[rows]))
    return _joined(found, len(recipe.members))


def candidates_at(
    scores: Scores, members: Sequence[str], shared: SharedPositions, block: slice, num_candidates: int
) -> list[Candidates]:
    """What members (main first) said at some of the shared positions."""
    pairs = zip(members, shared.slots, strict=True)
    return [_candidates(scores.members[member], slots[block], num_candidates) for member, slots in pairs]


def _candidates(part: MemberScores, slots: Tensor, num: int) -> Candidates:
    stored = part.candidates
    return Candidates(stored.token_ids[slots], stored.logprobs[slots], stored.tail[slots]).best(num)


def _judged(fused: Fused, main: Candidates, true: Tensor, own: Tensor) -> FusedPositions:
    """true: (B,) main's next ids; own: (B,) main's log-probabilities of them."""
    hits = fused.token_ids == true.unsqueeze(1)  # (B, S)
    inside = fused.logprobs.masked_fill(~hits, -torch.inf).amax(dim=1)
    outside = torch.where(main.tail > -torch.inf, own + fused.tail - main.tail, -torch.inf)
    logprobs = torch.where(hits.any(dim=1), inside, outside)
    floor = own + _FLOOR
    return FusedPositions(
        logprobs=torch.maximum(logprobs, floor),
        top=greedy(fused.token_ids, fused.logprobs),
        unmapped=fused.unmapped,
        ruled_out=logprobs < floor,
    )


def _joined(parts: Sequence[FusedPositions], num_members: int) -> FusedPositions:
    if not parts:
        empty = torch.zeros(0)
        return FusedPositions(empty, empty.long(), torch.zeros(0, num_members), empty.bool())
    return FusedPositions(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.top for part in parts]),
        torch.cat([part.unmapped for part in parts]),
        torch.cat([part.ruled_out for part in parts]),
    )


def document_nats(scores: Scores, main: str, shared: SharedPositions, fused: FusedPositions) -> Tensor:
    """-log p of each document's scored bytes, (D,) float64."""
    part = scores.members[main]
    logprobs = part.logprob.double().index_put((shared.rows,), fused.logprobs.double())
    return _summed(scores, part.document, -logprobs * part.scored)


def document_sums(
    scores: Scores, recipe: Recipe, vocabularies: Mapping[str, Vocabulary], num_candidates: int
) -> DocumentSums:
    """All sums for a recipe; to a member alone those positions are shared that all stored members share."""
    main, alone = scores.members[recipe.main], len(recipe.members) == 1
    others = [name for name in scores.members if name != recipe.main]
    shared = shared_positions(scores, [recipe.main, *others] if alone else recipe.members)
    fused = _alone(main, shared) if alone else fuse_positions(scores, recipe, shared, num_candidates)

    def total(values: Tensor) -> Tensor:
        return _summed(scores, main.document[shared.rows], values.double() * main.scored[shared.rows])

    parts = zip(recipe.members, shared.slots, strict=False)
    tops = {member: _top(scores.members[member], slots) for member, slots in parts}
    spelt = {member: _spelt(vocabularies[member], top) for member, top in tops.items()}
    chosen = _spelt(vocabularies[recipe.main], fused.top)
    return DocumentSums(
        bits=document_nats(scores, recipe.main, shared, fused) / math.log(2),
        num_bytes=scores.num_bytes.double(),
        positions=total(torch.ones(len(shared.rows))),
        shared_nats=total(-fused.logprobs),
        main_nats=total(-main.logprob[shared.rows]),
        overruled=total(fused.top != tops[recipe.main]),
        agreed={member: total(_equal(spelt[member], chosen)) for member in recipe.members[1:]},
        unmapped={member: total(fused.unmapped[:, i]) for i, member in enumerate(recipe.members)},
        ruled_out=total(fused.ruled_out),
    )


def _alone(main: MemberScores, shared: SharedPositions) -> FusedPositions:
    """One member passes through untouched."""
    num = len(shared.rows)
    nothing = torch.zeros(num, dtype=torch.bool)
    return FusedPositions(main.logprob[shared.rows], _top(main, shared.slots[0]), torch.zeros(num, 1), nothing)


def _top(part: MemberScores, slots: Tensor) -> Tensor:
    return greedy(part.candidates.token_ids[slots], part.candidates.logprobs[slots])


def _spelt(vocabulary: Vocabulary, token_ids: Tensor) -> list[bytes]:
    return [vocabulary.text_bytes(token_id) for token_id in token_ids.tolist()]


def _equal(left: list[bytes], right: list[bytes]) -> Tensor:
    return torch.tensor([a == b for a, b in zip(left, right, strict=True)], dtype=torch.float64)


def _summed(scores: Scores, documents: Tensor, values: Tensor) -> Tensor:
    """Values of rows summed into their documents: (D,) float64."""
    out = torch.zeros(len(scores), dtype=torch.float64)
    return out.index_add_(0, documents.long(), values)

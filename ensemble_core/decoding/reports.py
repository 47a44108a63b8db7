"""What a client is told about a token: log-probabilities and traces, as plain numbers.

Both describe the distribution before penalties, bias and temperature. Does not know sequences, text offsets or
outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ensemble_core.decoding.logprobs import Scored
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import LEAST_LOGPROB, DraftTrace, Trace
from ensemble_core.fusion.base import Fused
from ensemble_core.members.base import Candidates
from ensemble_core.members.ranking import ranked
from ensemble_core.stats import Reason
from ensemble_core.text.alignment import Track
from ensemble_core.text.vocabulary import Vocabulary

NUM_TRACED = 5  # candidates of each member in a trace


def score(token_ids: Tensor, logprobs: Tensor, token_id: int, num_top: int, *, ranks: bool = False) -> Scored:
    """A token's log-probability in one row (S,), and the `num_top` likeliest ids, with the token always among them.

    An id may occur twice in a row; the likelier entry counts. A token without mass gets `LEAST_LOGPROB`. ranks: also
    count the ids that are likelier.
    """
    own = max(logprobs[token_ids == token_id].amax().item(), LEAST_LOGPROB)
    best = _best(token_ids, logprobs, num_top)
    if num_top and token_id not in (other for other, _ in best):
        best = (*best, (token_id, own))
    rank = 1 + len(set(token_ids[logprobs > own].tolist())) if ranks else None
    return Scored(own, best, rank)


def trace(
    recipe: Recipe,
    tracks: Mapping[str, Track],
    candidates: Mapping[str, Candidates],
    fused: Fused,
    row: int,
    token_id: int,
    left_out: Mapping[str, Reason],
    draft: DraftTrace | None = None,
) -> Trace:
    """What the members and the fusion proposed for one row's token, and which members were left out.

    candidates: member that answered -> its candidates, main first. draft: what became of the token that was drafted.
    """
    main, *others = candidates
    spell = {member: tracks[member].vocabulary for member in candidates}
    best = {
        member: _best(part.token_ids[row], part.logprobs[row], NUM_TRACED) for member, part in candidates.items()
    }
    proposals = {
        member: tuple((spell[member].name_of(other), _probability(logprob)) for other, logprob in found)
        for member, found in best.items()
    }
    alone = len(recipe.members) == 1 and not left_out
    consulted = draft.needed if draft is not None else bool(others) or alone
    mixed = _best(fused.token_ids[row], fused.logprobs[row], NUM_TRACED)
    return Trace(
        token=spell[main].name_of(token_id),
        consulted=consulted,
        members=proposals,
        fused=tuple((spell[main].name_of(other), _probability(logprob)) for other, logprob in mixed),
        agreed={
            member: spell[member].text_bytes(best[member][0][0]) == spell[main].text_bytes(token_id)
            for member in others
        },
        weights=_weights(recipe, list(candidates) if consulted else [main]),
        left_out=left_out,
        draft=draft,
        prob=_mass(fused.token_ids[row], fused.logprobs[row], [token_id]),
        entropy=_entropy(fused.logprobs[row], fused.tail[row]),
        given={member: _given(spell, member, part, row, token_id) for member, part in candidates.items()},
        unmapped={
            member: round(mass, 6)
            for member, mass in zip(
                candidates, fused.unmapped[row].tolist(), strict=False
            )  # those that were fused
        },
        spelling=None if token_id in spell[main].special_ids else spell[main].tokens[token_id],
    )


def _entropy(logprobs: Tensor, tail: Tensor) -> float:
    """Entropy of a row (S,) and the mass outside it, in nats."""
    outside = math.exp(tail.item())
    rest = -outside * math.log(outside) if outside > 0.0 else 0.0
    return round(float(torch.special.entr(logprobs.exp()).sum()) + rest, 6)


def _given(
    spell: Mapping[str, Vocabulary], member: str, part: Candidates, row: int, token_id: int
) -> float | None:
    """The probability that a member gives to main's token. spell: member -> its vocabulary, main first."""
    main, own = next(iter(spell.values())), spell[member]
    if own is main:
        ids = [token_id]
    elif token_id in main.stop_ids:
        ids = sorted(own.stop_ids)
    else:
        same = own.ids_by_bytes.get(main.tokens[token_id])
        ids = [] if same is None or token_id in main.special_ids else [same]
    return _mass(part.token_ids[row], part.logprobs[row], ids) if ids else None


def _mass(token_ids: Tensor, logprobs: Tensor, ids: Sequence[int]) -> float:
    """The probability of some ids in a row (S,); an id that is not in it has none."""
    found = [value for each in ids for value in logprobs[token_ids == each].tolist()]
    return round(math.fsum(map(math.exp, found)), 6)


def _weights(recipe: Recipe, members: Sequence[str]) -> dict[str, float]:
    """Weights of the consulted members, scaled to sum to 1; main alone has weight 1."""
    known = dict(zip(recipe.members, recipe.weights, strict=True))
    total = sum(known[member] for member in members)
    return (
        {member: round(known[member] / total, 6) for member in members}
        if total and len(members) > 1
        else {members[0]: 1.0}
    )


def _best(token_ids: Tensor, logprobs: Tensor, num: int) -> tuple[tuple[int, float], ...]:
    """The `num` likeliest ids of a row with their log-probabilities, best first, of equals the lowest id."""
    places = ranked(logprobs, num, token_ids)
    pairs = zip(token_ids[places].tolist(), logprobs[places].tolist(), strict=True)
    return tuple((token_id, value) for token_id, value in pairs if value > -float("inf"))


def _probability(logprob: float) -> float:
    return round(math.exp(logprob), 6)

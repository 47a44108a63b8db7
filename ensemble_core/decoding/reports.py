"""What a client is told about a token: log-probabilities and traces, as plain numbers.

Both describe the distribution before penalties, bias and temperature. An id that a request names and that is outside
the fused support has there its share of main's tail, scaled as the fusion scales it. Does not know sequences, text
offsets or outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_core.decoding.logprobs import Scored
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import LEAST_LOGPROB, DraftTrace, Trace
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.fusion.base import Fused
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import columns_of
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


@dataclass(frozen=True, slots=True)
class Named:
    """What main says of the ids that a request names, and of all that is outside its candidates in the fusion."""

    logprobs: Mapping[int, float]
    tail: float  # log-mass


def named(params: SamplingParams, wide: Candidates, row: int, tail: Tensor) -> Named | None:
    """Row `row` of main's answer, which holds all that is named. tail: (), of what goes into the fusion."""
    if not params.logprob_token_ids:
        return None
    ids = list(dict.fromkeys(params.logprob_token_ids))
    own = wide.token_ids[row]
    found = wide.logprobs[row][columns_of(own, torch.tensor(ids, device=own.device))]
    return Named(dict(zip(ids, found.tolist(), strict=True)), tail.item())


def scored(params: SamplingParams, fused: Fused, row: int, token_id: int, named: Named | None) -> Scored | None:
    """What a request wants to know of a token in one row; None if nothing."""
    if named is None:
        num_top = params.logprobs
        return None if num_top is None else score(fused.token_ids[row], fused.logprobs[row], token_id, num_top)
    wanted = list(dict.fromkeys((token_id, *named.logprobs)))
    told = _inside(fused.token_ids[row], fused.logprobs[row], wanted)
    if missing := [other for other in wanted if other not in told]:
        told |= _shares(named, missing, fused.tail[row].item())
    pairs = [(other, max(told[other], LEAST_LOGPROB)) for other in wanted]
    return Scored(pairs[0][1], tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))))


def _shares(named: Named, missing: list[int], tail: float) -> dict[int, float]:
    """What ids outside the support have of the fused tail: as much as of main's, which may be rounded to nothing."""
    own = {other: named.logprobs[other] for other in missing}
    total = math.log(mass) if (mass := math.fsum(map(math.exp, own.values()))) > 0 else -math.inf
    whole = max(named.tail, total)
    return {other: logprob + tail - whole if whole > -math.inf else -math.inf for other, logprob in own.items()}


def _inside(token_ids: Tensor, logprobs: Tensor, wanted: list[int]) -> dict[int, float]:
    """Those of `wanted` that a row's support holds, with their log-probabilities; the likelier entry counts."""
    places = torch.isin(token_ids, torch.tensor(wanted, device=token_ids.device)).nonzero().flatten()
    found: dict[int, float] = {}
    for token_id, logprob in zip(token_ids[places].tolist(), logprobs[places].tolist(), strict=True):
        found[token_id] = max(found.get(token_id, -math.inf), logprob)
    return found


def trace(
    recipe: Recipe,
    tracks: Mapping[str, Track],
    candidates: Mapping[str, Candidates],
    fused: Fused,
    row: int,
    token_id: int,
    left_out: Mapping[str, Reason],
    draft: DraftTrace | None = None,
    weights: Sequence[float] = (),
) -> Trace:
    """What the members and the fusion proposed for one row's token, and which members were left out.

    candidates: member that answered -> its candidates, main first. draft: what became of the token that was drafted.
    weights: with which these members were fused at this place; none: main decided alone.
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
        weights=_weights(list(candidates), weights) if consulted else {main: 1.0},
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


def _weights(members: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Weights of the consulted members; main alone has weight 1."""
    if len(members) == 1:
        return {members[0]: 1.0}
    return {member: round(weight, 6) for member, weight in zip(members, weights, strict=True)}


def _best(token_ids: Tensor, logprobs: Tensor, num: int) -> tuple[tuple[int, float], ...]:
    """The `num` likeliest ids of a row with their log-probabilities, best first, of equals the lowest id."""
    places = ranked(logprobs, num, token_ids)
    pairs = zip(token_ids[places].tolist(), logprobs[places].tolist(), strict=True)
    return tuple((token_id, value) for token_id, value in pairs if value > -float("inf"))


def _probability(logprob: float) -> float:
    return round(math.exp(logprob), 6)

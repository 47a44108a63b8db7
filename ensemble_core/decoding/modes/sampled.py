"""The sampled mode: each token is drawn from one member, and a member is drawn by its weight.

A linear pool sum_i w_i p_i is a mixture, so a draw from member i, taken with probability w_i, has the pool's
distribution (ME, arXiv 2605.00419). Only that member is fed; the others catch up when they are next drawn. Its token
is carried into main's vocabulary as the pool carries it. The place's one random number picks the member; where it
fell within the member's weight is again uniform and picks the token.

What a member did not name (its tail) is drawn anew, with the number's place within the tail; what has no token in
main's vocabulary is left to main, as in the pool. At a temperature other than 1 each member's candidates are tempered
before they are pooled, not after, and their tail, whose tempered mass nobody knows, is left out.

Requests that need the fused numbers (greedy, log-probabilities, traces, penalties, biases, constraints, min_tokens,
top-k, top-p, min-p) are served by `verify`. While a character is incomplete main decides alone.

Knows candidates and the map between vocabularies; does not know scheduling or caches.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ensemble_core.decoding.modes.base import MODES, Ask, Decision, Outcome, Turn, joined
from ensemble_core.decoding.modes.lockstep import failed
from ensemble_core.decoding.modes.verify import Verify
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.rhythm import Beat, Prospect
from ensemble_core.decoding.sampler import ladder
from ensemble_core.decoding.sequence import Choice, Sequence
from ensemble_core.fusion.base import Mixture
from ensemble_core.members.base import Answers

FURTHEST = 64  # tokens that a member may lie behind, so that what it has to catch up with stalls nobody
_MOST_DRAWS = 8  # of one place in one step
_BELOW_ONE = 1.0 - 2**-53


class SampledOptions(BaseModel):
    """The sampled mode has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@MODES.register("sampled", SampledOptions)
@dataclass(frozen=True)
class Sampled:
    """See the module's docstring."""

    options: SampledOptions = field(default_factory=SampledOptions)
    otherwise: Verify = field(default_factory=Verify)

    needs_mixture = True

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """See `Mode.prospect`."""
        return None if _is_drawn(sequence) else self.otherwise.prospect(sequence)

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """The member that is drawn, and what others that are far behind have to catch up with."""
        if not _is_drawn(sequence):
            return self.otherwise.plan(sequence, beat)
        drawn = sequence.recipe.main
        if not sequence.mid_character:
            drawn, _ = _member(sequence.recipe, sequence.draw())
        behind = {
            member: Ask(track.num_uncached - 1, 0)
            for member, track in sequence.tracks.items()
            if member != drawn and track.num_uncached > FURTHEST
        }
        return {drawn: Ask(sequence.tracks[drawn].num_uncached), **behind}

    @torch.inference_mode()
    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`. A turn gets a token, unless its number fell on what the drawn member did not name."""
        parts = []
        if others := [turn for turn in turns if not _is_drawn(turn.sequence)]:
            parts.append(self.otherwise.decide(others, answers, num_candidates))
        if own := [turn for turn in turns if _is_drawn(turn.sequence)]:
            started = time.perf_counter()
            decisions = _drawn(own, answers)
            parts.append(Outcome(decisions, sampling_seconds=time.perf_counter() - started))
        return joined(parts)


@dataclass(frozen=True, slots=True)
class _Draw:
    """One turn's draw. place: where the number lies within the member's weight, from [0, 1)."""

    turn: Turn
    member: str
    place: float

    @property
    def number(self) -> float:
        """The place's random number that leads to this draw."""
        sequence = self.turn.sequence
        return self.place if sequence.mid_character else _number(sequence.recipe, self.member, self.place)

    def again(self, number: float) -> _Draw:
        """The draw that another number leads to."""
        return _draw(self.turn, number)


def _draw(turn: Turn, number: float) -> _Draw:
    sequence = turn.sequence
    if sequence.mid_character:
        return _Draw(turn, sequence.recipe.main, number)
    return _Draw(turn, *_member(sequence.recipe, number))


def _is_drawn(sequence: Sequence) -> bool:
    """Whether a request's tokens can be drawn from one member at a time."""
    request, params = sequence.request, sequence.request.params
    whole = params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0
    asks = request.trace or params.logprobs is not None or params.shapes_logits or params.min_tokens > 0
    return whole and not (params.greedy or asks or sequence.constraint is not None)


def _member(recipe: Recipe, number: float) -> tuple[str, float]:
    """The member at a number from [0, 1), main first, and where the number lies within the member's weight."""
    begin, last = 0.0, (recipe.main, 0.0)
    for member, weight in zip(recipe.members, recipe.weights, strict=True):
        if weight > 0.0:
            last = member, min(max((number - begin) / weight, 0.0), _BELOW_ONE)
            if number < begin + weight:
                break
        begin += weight
    return last


def _number(recipe: Recipe, wanted: str, place: float) -> float:
    """The number at which a member is drawn, `place` within its weight."""
    index = recipe.members.index(wanted)
    return min(sum(recipe.weights[:index]) + place * recipe.weights[index], _BELOW_ONE)


def _drawn(turns: abc.Sequence[Turn], answers: Mapping[str, Answers]) -> list[Decision]:
    """A decision for each turn. A draw goes on at once if its next member has answered, too."""
    decisions: list[Decision] = []
    draws = [_draw(turn, turn.sequence.draw()) for turn in turns]
    for _ in range(_MOST_DRAWS):
        ready: dict[str, list[_Draw]] = {}
        for draw in draws:
            if draw.member in draw.turn.feeds:
                ready.setdefault(draw.member, []).append(draw)
            else:
                decisions.append(_put_off(draw))
        outcomes = [found for member, own in ready.items() for found in _outcomes(member, own, answers[member])]
        decisions += (found for found in outcomes if isinstance(found, Decision))
        draws = [found for found in outcomes if isinstance(found, _Draw)]
    return decisions + [_put_off(draw) for draw in draws]


def _put_off(draw: _Draw) -> Decision:
    """No token yet. In place of a member that does not answer another one is drawn."""
    turn = draw.turn
    if draw.member in turn.left_out:
        member, place = _member(turn.recipe, draw.place)
        draw = _Draw(turn, member, place)
    return Decision(turn.sequence, redraw=draw.number)


def _outcomes(member: str, draws: abc.Sequence[_Draw], answers: Answers) -> list[Decision | _Draw]:
    """What becomes of draws from one member that has answered."""
    rows = answers.last([draw.turn.feeds[member] for draw in draws])
    params = [draw.turn.sequence.request.params for draw in draws]
    tempered = torch.tensor([[each.temperature != 1.0] for each in params], device=rows.tail.device)
    named = torch.where(tempered, 1.0, 1.0 - rows.tail.double().exp().unsqueeze(1))  # (B, 1)
    place = torch.tensor([[draw.place] for draw in draws], dtype=torch.float64, device=rows.tail.device)
    steps = ladder(rows.token_ids, rows.logprobs, params)
    within = (place / named).clamp(0.0, _BELOW_ONE)
    found = steps.find(within)
    own = steps.token_ids.gather(1, found).squeeze(1)
    carried = _carried(draws, member, own).tolist()
    rest, left = (
        steps.within(found, within).squeeze(1).tolist(),
        ((place - named) / (1.0 - named)).squeeze(1).tolist(),
    )
    finite, beyond = rows.logprobs.amax(dim=1).isfinite().tolist(), (place >= named).squeeze(1).tolist()
    outcomes: list[Decision | _Draw] = []
    for i, draw in enumerate(draws):
        sequence = draw.turn.sequence
        if not finite[i]:
            outcomes.append(_broken(draw))
        elif beyond[i]:
            outcomes.append(draw.again(min(left[i], _BELOW_ONE)))
        elif carried[i] < 0:
            outcomes.append(_Draw(draw.turn, sequence.recipe.main, rest[i]))
        else:
            outcomes.append(Decision(sequence, (Choice(carried[i]),)))
    return outcomes


def _carried(draws: abc.Sequence[_Draw], member: str, token_ids: Tensor) -> Tensor:
    """Main's ids for tokens of a member; -1 where main has none."""
    carried, groups = token_ids.clone(), dict[int, list[int]]()
    recipes = [draw.turn.sequence.recipe for draw in draws]
    for i, recipe in enumerate(recipes):
        if member != recipe.main:
            groups.setdefault(id(recipe.fusion), []).append(i)
    for rows in groups.values():
        fusion, members = recipes[rows[0]].fusion, recipes[rows[0]].members
        assert isinstance(fusion, Mixture)
        carried[rows] = fusion.carried(members.index(member), token_ids[rows])
    return carried


def _broken(draw: _Draw) -> Decision:
    """The member's numbers are not finite: it is dropped, or the request fails."""
    if draw.turn.sequence.recipe.can_lose(draw.member):
        return Decision(draw.turn.sequence, unsound=(draw.member,))
    return failed(draw.turn, (draw.member,))

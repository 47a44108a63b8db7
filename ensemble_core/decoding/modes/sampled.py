"""The sampled mode: a member is drawn by its weight, and the token from that member's distribution alone.

A linear pool in main's vocabulary is p = sum_i w_i p~_i, so such a token has the pool's distribution although only
one member has answered. Source: ME (arXiv 2605.00419), docs/methods.md. Members that are not drawn catch up when they
are drawn next, or once they lie far behind. While the last character is incomplete main decides alone.

One random number a place decides both: it falls into some member's share of the weights, and where it falls there is
again uniform. That picks the token, in the member's own order. If it falls into the member's tail, what is left of it
draws anew; a token without a place in main's vocabulary leaves it to main. So a text depends on its seed, not on
other sequences or on preemption. A member that is drawn late and has not answered is asked in the next step.

At a temperature other than 1 each member's candidates are tempered before they are pooled, without their tails.
Requests that need the pool itself (greedy, log-probabilities, traces, penalties, biases, `min_tokens`, JSON, top-k,
top-p, min-p) are served by `verify`.

Knows tracks, candidates and where a fusion carries tokens; does not know scheduling or caches.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ensemble_core.decoding.modes.base import MODES, Ask, Decision, Outcome, Turn, joined
from ensemble_core.decoding.modes.judging import row_of
from ensemble_core.decoding.modes.lockstep import Lockstep, failed
from ensemble_core.decoding.modes.verify import Verify
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.rhythm import Beat, Prospect
from ensemble_core.decoding.sampler import ladder
from ensemble_core.decoding.sequence import Choice, Phase, Sequence
from ensemble_core.fusion.base import Mixture
from ensemble_core.members.base import Answers, Candidates

_TAIL = -1  # stands for all tokens outside a member's candidates
_MOST_TAILS = 256  # draws anew at one place; then the tail is left out
FURTHEST = 32  # tokens that a member may lie behind
_FRESH = 2.0**10  # what a number is multiplied by once a member is lost: its lower digits are new


class SampledOptions(BaseModel):
    """The sampled mode has no options. What it cannot serve goes to `verify` as that is by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Draw:
    """What is drawn at the end of a text: a member, and the number that picks the token in its distribution.

    number: from [0, 1), uniform whichever member it is. said: what members have answered at this place in earlier
    steps, one row each. passed: members that could not answer.
    """

    member: str
    number: float
    said: Mapping[str, Candidates] = field(default_factory=dict)
    passed: frozenset[str] = frozenset()


@MODES.register("sampled", SampledOptions)
@dataclass(frozen=True)
class Sampled:
    """See the module's docstring."""

    options: SampledOptions = field(default_factory=SampledOptions)
    otherwise: Verify = field(default_factory=Verify)

    needs_mixture = True

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """See `Mode.prospect`."""
        return self.otherwise.prospect(sequence) if needs_pool(sequence) else None

    def drafter(self, sequence: Sequence) -> str:
        """As in `verify`."""
        return self.otherwise.drafter(sequence)

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """The drawn member's uncached tokens, and without an answer those of members that lie far behind.

        While weights depend on a prompt that is not read, all members are asked. In prefill all read the prompt.
        """
        if needs_pool(sequence):
            return self.otherwise.plan(sequence, beat)
        if sequence.weighing:
            return Lockstep().plan(sequence)
        drawn, asks = _draw(sequence).member, dict[str, Ask]()
        most = 0 if sequence.phase is Phase.PREFILL else _furthest(sequence)
        for member, track in sequence.tracks.items():
            if member == drawn and track.num_uncached:
                asks[member] = Ask(track.num_uncached)
            elif member != drawn and track.num_uncached - 1 > most:
                asks[member] = Ask(track.num_uncached - 1, 0)  # one is left to be answered at
        return asks or {sequence.recipe.main: Ask(sequence.main.num_uncached)}

    @torch.inference_mode()
    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`. A turn gets one final token, or none if another member has to be asked."""
        parts = []
        if others := [turn for turn in turns if needs_pool(turn.sequence)]:
            parts.append(self.otherwise.decide(others, answers, num_candidates))
        if own := [turn for turn in turns if not needs_pool(turn.sequence)]:
            parts.append(_decide(own, answers))
        return joined(parts)


def needs_pool(sequence: Sequence) -> bool:
    """Whether a request needs the pooled distribution itself, all its life."""
    request, params = sequence.request, sequence.request.params
    reported = request.trace or params.reports_tokens
    bound = params.shapes_logits or params.min_tokens > 0 or sequence.constraint is not None
    cut = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
    return params.greedy or reported or bound or cut


def _furthest(sequence: Sequence) -> int:
    """How far a member may lie behind: not the same for all, so that not all catch up in one step."""
    return FURTHEST // 2 + sequence.seq_id % (FURTHEST // 2)


def _draw(sequence: Sequence) -> Draw:
    """The draw at the end of a text: what is left of an earlier step, or of the place's own number."""
    ends = sequence.ends
    if isinstance(ends, Draw):
        if ends.member in sequence.tracks:
            return ends
        member, number = _aim(sequence, sequence.recipe.without(ends.passed), ends.number)
        return replace(ends, member=member, number=number)
    number = sequence.draw()
    for reason in sequence.dropped.values():  # it may have drawn the lost member: its first digits are not random
        if reason != "full":  # that shows before anything is drawn at a place
            number = number * _FRESH % 1.0
    return Draw(*_aim(sequence, sequence.recipe, number))


def _aim(sequence: Sequence, recipe: Recipe, number: float) -> tuple[str, float]:
    """The member that a uniform number draws, and where within its share it falls: a uniform number again."""
    if sequence.mid_character:
        return recipe.main, number
    left = number
    for member, weight in zip(recipe.members, recipe.weights, strict=True):
        if left < weight:
            return member, left / weight
        left -= weight
    return recipe.main, number  # the weights sum to a hair less than 1


def _decide(turns: abc.Sequence[Turn], answers: Mapping[str, Answers]) -> Outcome:
    """Draw a token for each turn, those that draw from one member in one batch."""
    started = time.perf_counter()
    lots = [_Lot(turn, answers) for turn in turns]
    while groups := _groups(lot for lot in lots if lot.is_ready):
        for part, group in groups:
            _look_up(part, group)
    decisions = [lot.decision() for lot in lots]
    return Outcome(decisions, sampling_seconds=time.perf_counter() - started)


class _Lot:
    """What becomes of one turn, draw by draw.

    draw: the present one. rows: member -> some answers, and which row of them is its answer at the place. num_tails:
    how often a number fell into a tail. token: of main; None: not drawn yet. broken: members whose numbers are not
    finite and that cannot be lost.
    """

    def __init__(self, turn: Turn, answers: Mapping[str, Answers]) -> None:
        self.turn, self.draw = turn, _draw(turn.sequence)
        self.rows = {member: (part, 0) for member, part in self.draw.said.items()}
        for member, feed in turn.feeds.items():
            span = answers[member].spans[feed]
            if span.start < span.stop:
                self.rows[member] = answers[member].blocks[span.block], span.stop - 1
        self.num_tails = 0
        self.token: int | None = None
        self.broken: tuple[str, ...] = ()
        if self.draw.member in turn.left_out:
            self._again(self.draw.number)

    @property
    def is_ready(self) -> bool:
        """Whether the drawn member has answered and its token is not looked up yet."""
        return self.token is None and not self.broken and self.draw.member in self.rows

    @property
    def counts_tail(self) -> bool:
        """Whether tokens outside the candidates may be drawn, which draws anew."""
        return self.turn.sequence.request.params.temperature == 1.0 and self.num_tails < _MOST_TAILS

    def take(self, token: int, place: int, number: float, is_finite: bool) -> None:
        """Take in what was looked up.

        token: of the drawn member. place: main's id for it. number: where the draw's number fell within its part.
        """
        if not is_finite:
            self._lose()
        elif token == _TAIL:
            self.num_tails += 1
            self._again(number)
        elif place >= 0:
            self.token = place
        else:
            self.draw = replace(self.draw, member=self.turn.sequence.recipe.main, number=number)

    def decision(self) -> Decision:
        """What the mode decides: a token, a failure, or that another member is to be asked."""
        sequence, unsound = self.turn.sequence, self.turn.non_finite
        if self.broken:
            return failed(self.turn, (*unsound, *self.broken))
        if self.token is None:
            said = {member: row_of(part, row) for member, (part, row) in self.rows.items()}
            return Decision(sequence, ends=replace(self.draw, said=said), unsound=unsound)
        consulted = int(len(sequence.recipe.members) > 1 and not sequence.mid_character)
        drawn = self.draw.member
        return Decision(sequence, (Choice(self.token),), unsound=unsound, consulted=consulted, drawn=drawn)

    def _again(self, number: float) -> None:
        """Draw a member anew, of those that can answer."""
        sequence, passed = self.turn.sequence, self.draw.passed.union(self.turn.left_out)
        member, number = _aim(sequence, sequence.recipe.without(passed), number)
        self.draw = replace(self.draw, member=member, number=number, passed=passed)

    def _lose(self) -> None:
        """Go on without the drawn member, whose numbers are not finite, or fail."""
        member = self.draw.member
        if not self.turn.recipe.can_lose(member):
            self.broken = (member,)
            return
        del self.rows[member]
        self.turn = self.turn.without((member,), "non_finite")
        self._again(self.draw.number)


def _groups(lots: Iterable[_Lot]) -> list[tuple[Candidates, list[_Lot]]]:
    """Those whose drawn members' answers lie in one block, with the block."""
    groups: dict[int, tuple[Candidates, list[_Lot]]] = {}
    for lot in lots:
        part, _ = lot.rows[lot.draw.member]
        groups.setdefault(id(part), (part, []))[1].append(lot)
    return list(groups.values())


def _look_up(part: Candidates, lots: abc.Sequence[_Lot]) -> None:
    """Find each lot's number among its row's candidates, from likely to unlikely, the tail one of them."""
    rows = part.rows([lot.rows[lot.draw.member][1] for lot in lots])
    device = rows.tail.device
    counted = torch.tensor([lot.counts_tail for lot in lots], device=device)
    tail = torch.where(counted, rows.tail, -torch.inf).unsqueeze(1)
    token_ids = torch.cat([rows.token_ids, torch.full_like(tail, _TAIL, dtype=torch.long)], dim=1)
    params = [lot.turn.sequence.request.params for lot in lots]
    steps = ladder(token_ids, torch.cat([rows.logprobs, tail], dim=1), params)
    numbers = torch.tensor([[lot.draw.number] for lot in lots], dtype=torch.float64, device=device)
    place = steps.find(numbers)
    tokens, within = steps.token_ids.gather(1, place).squeeze(1), steps.within(place, numbers).squeeze(1)
    is_finite = rows.logprobs.amax(dim=1).isfinite()
    found = (tokens, _carried(lots, tokens), within, is_finite)
    for lot, *each in zip(lots, *(numbers.tolist() for numbers in found), strict=True):
        lot.take(*each)


def _carried(lots: abc.Sequence[_Lot], token_ids: Tensor) -> Tensor:
    """Main's ids for tokens of the drawn member, (B,) -> (B,); -1 where main has none."""
    carried, groups = token_ids.clone(), dict[int, list[int]]()
    recipes = [lot.turn.sequence.recipe for lot in lots]
    for i, recipe in enumerate(recipes):
        if lots[i].draw.member != recipe.main:
            groups.setdefault(id(recipe.fusion), []).append(i)
    for rows in groups.values():
        recipe, member = recipes[rows[0]], lots[rows[0]].draw.member
        assert isinstance(recipe.fusion, Mixture)
        carried[rows] = recipe.fusion.carried(recipe.members.index(member), token_ids[rows])
    return carried

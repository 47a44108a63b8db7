"""The verify mode: main drafts some tokens, then every assistant reads them in one forward and the ensemble decides.

A drafted token is judged where the place before it is *sound* (`places.py`), unless the assistants agree with it
anyway (it is not *needed*). The first judged token that the fusion would have chosen otherwise is replaced, and what
follows it is taken back. At all other places main's token stands. Source: SAFE (arXiv 2510.15346), docs/methods.md.

A drafted token is what main alone would choose at its place with the place's own random number, and whether a sampled
one stays follows from the same number (`acceptance.py`). So a text is the very text that the rule gives one token at
a time: it depends neither on how long drafts are nor on other sequences.

The beat (`decoding/rhythm.py`) says whether main drafts, the assistants read, or both. Where shaping depends on the
tokens before (penalties, JSON, min_tokens) all members answer in every step, and main decides what that step cannot
judge. The first token of a text is decided as in lockstep.

Main's draft can be guessed: by what followed its last tokens before, or by an assistant (`relay.py`). It is fed the
guesses and says what it would have chosen itself, so no text depends on who guessed.

Knows tracks, candidates and fusions; does not know scheduling or caches.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble_core.decoding.modes import relay
from ensemble_core.decoding.modes.base import MODES, Ask, Outcome, Turn, joined
from ensemble_core.decoding.modes.case import Case, with_finite
from ensemble_core.decoding.modes.drafts import chosen_by_main, strength
from ensemble_core.decoding.modes.judging import Rule, judge
from ensemble_core.decoding.modes.lockstep import Lockstep
from ensemble_core.decoding.modes.places import (
    draft_of,
    is_complete,
    likely_to_stay,
    note_of,
    num_judged,
    num_reading,
)
from ensemble_core.decoding.rhythm import FURTHEST, LONGEST, Beat, Prospect
from ensemble_core.decoding.sequence import Drafted, Sequence
from ensemble_core.members.base import Answers


class VerifyOptions(BaseModel):
    """How drafts are made and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    drafter: str = Field(
        "main",
        description="main; an assistant, which writes ahead in its own tokens for a main member that costs more; or "
        "lookup: main drafts no further than guesses from lookup reach.",
    )
    draft: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = Field(
        "auto",
        description="Tokens of a draft; auto: as many as pay, by main's certainty, by what stayed and by cost.",
    )
    lookup: bool | None = Field(
        None,
        description="Main is fed guesses of its next tokens, taken from where the last ones occurred before. By "
        "default yes, unless an assistant drafts, which guesses in its stead.",
    )
    needed: Literal["consensus", "always"] = Field(
        "consensus",
        description="consensus: a greedy token with which the assistants agree is not fused; always: it is.",
    )
    certificates: bool = Field(
        True,
        description="A greedy token of main that no assistant could change, by a bound of the fusion, is not judged.",
    )
    acceptance: Literal["rejection", "common"] = Field(
        "rejection",
        description="How a sampled token is judged. rejection: kept with probability fused/drafted, as often as can "
        "be. common: the fusion draws with the number that main drew with, so seeds give the texts of lockstep.",
    )
    sharpen: bool = Field(
        False, description="Where no fused token has half of the mass, the likeliest takes that of its extensions."
    )

    @model_validator(mode="after")
    def _check_lookup(self) -> Self:
        if self.drafter == "lookup" and self.lookup is False:
            raise ValueError("drafter: lookup needs lookup; leave lookup out, or choose another drafter")
        if self.drafter not in ("main", "lookup") and self.lookup:
            raise ValueError(
                f"lookup: the guesses come from the drafter {self.drafter}; leave lookup out, or choose drafter main"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of a draft at most."""
        if isinstance(self.draft, int):
            return self.draft
        return 1 if self.drafter == "lookup" else LONGEST

    @property
    def looks_up(self) -> bool:
        """Whether guesses are looked up."""
        return self.lookup is not False and self.drafter in ("main", "lookup")

    @property
    def rule(self) -> Rule:
        """How places are judged."""
        return Rule(self.needed == "consensus", self.acceptance == "rejection", self.sharpen)


@MODES.register("verify", VerifyOptions)
@dataclass(frozen=True)
class Verify:
    """See the module's docstring."""

    options: VerifyOptions = field(default_factory=VerifyOptions)

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """See `Mode.prospect`."""
        if _in_lockstep(sequence) or sequence.is_bound:
            return None
        return self._prospect(sequence)

    def drafter(self, sequence: Sequence) -> str:
        """See `Mode.drafter`. An assistant that is lost, or has no room, drafts no more."""
        name = self.options.drafter
        able = name in sequence.recipe.members[1:] and not sequence.is_bound and not sequence.cramped
        return name if able else sequence.recipe.main

    def _prospect(self, sequence: Sequence) -> Prospect:
        fixed = self.options.draft != "auto" or self.options.drafter == "lookup"
        if (drafter := self.drafter(sequence)) != sequence.recipe.main:
            return relay.prospect(sequence, drafter, self.options.longest, fixed)
        draft, longest = draft_of(sequence), self.options.longest
        complete = is_complete(sequence)
        guesses = sequence.drafted[len(draft) :]
        unread = [track.num_uncached for track in list(sequence.tracks.values())[1:]]
        judged = num_judged(sequence) > 0 and (sequence.cramped or len(draft) >= longest)
        return Prospect(
            num_unread=sum(unread),
            likely=likely_to_stay(sequence),
            survival=sequence.habits.average,
            due=complete or judged or max(unread, default=0) >= FURTHEST,
            eager=fixed and len(draft) < longest,
            complete=complete,
            free=not fixed,
            num_guessed=len(guesses),
            guess=sequence.guess_habits.survival(strength(guesses[0])) if guesses else 0.0,
        )

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """Main's next tokens, every assistant's reading of the draft, or both."""
        if _in_lockstep(sequence):
            return Lockstep().plan(sequence)
        if (drafter := self.drafter(sequence)) != sequence.recipe.main:
            return relay.plan(sequence, drafter, beat, self._prospect(sequence))
        prospect, beat = self._prospect(sequence), Beat() if sequence.is_bound else beat
        readings = _readings(sequence) if beat.read or prospect.complete else {}
        if readings and not beat.drafts(prospect) and _leads_on(sequence, prospect):
            return readings
        num_guesses = beat.guesses(prospect)
        count = sequence.main.num_uncached - sequence.num_guessed + num_guesses
        return {sequence.recipe.main: Ask(count, 1 + num_guesses), **readings}

    @torch.inference_mode()
    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`. A turn gets as many final tokens as its draft was judged."""
        parts = []
        if alone := [turn for turn in turns if _in_lockstep(turn.sequence)]:
            parts.append(Lockstep().decide(alone, answers, num_candidates))
        if drafting := [turn for turn in turns if not _in_lockstep(turn.sequence)]:
            parts.append(self._decide(drafting, answers, num_candidates))
        return joined(parts)

    def _decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        started = time.perf_counter()
        fed = [turn for turn in turns if turn.recipe.main in turn.feeds]
        chosen = chosen_by_main(fed, answers, num_candidates, self.options.certificates)
        sampling = time.perf_counter() - started
        rule = self.options.rule
        cases = self._cases(with_finite(turns, answers), chosen, answers)
        whole = [case for case in cases if case.goes_on]
        drafts = judge([place for case in whole for place in case.places(answers)], num_candidates, rule)
        for case in whole:
            case.read(drafts, answers)
        ends = judge([place for case in whole for place in case.front()], num_candidates, rule)
        for case in whole:
            case.close(ends)
        decisions = [case.decision(self.options.looks_up) for case in cases]
        return Outcome(decisions, drafts.fusions + ends.fusions, sampling)

    def _cases(
        self, turns: abc.Sequence[Turn], chosen: Mapping[int, list[Drafted]], answers: Mapping[str, Answers]
    ) -> list[Case]:
        """Each turn's case. chosen: sequence -> what main would choose."""
        drafters = [self.drafter(turn.sequence) for turn in turns]
        led = [
            (turn, drafter) for turn, drafter in zip(turns, drafters, strict=True) if drafter != turn.recipe.main
        ]
        proposals, cases = relay.proposed(led, answers), list[Case]()
        for turn, drafter in zip(turns, drafters, strict=True):
            key = turn.sequence.seq_id
            own = chosen.get(key, [])
            if drafter == turn.recipe.main:
                cases.append(Case(turn, own))
            else:
                cases.append(relay.RelayCase(turn, own, drafter, proposals.get(key), answers))
        return cases


def _in_lockstep(sequence: Sequence) -> bool:
    """Whether a sequence's next token is decided as in lockstep: the first, which is at a shared place anyway."""
    begins = sequence.num_completion_tokens == 0 or len(sequence.recipe.members) == 1
    return begins and not sequence.drafted


def _leads_on(sequence: Sequence, prospect: Prospect) -> bool:
    """Whether a reading alone may be waited for. Where it would decide nothing, its readers may be busy for long."""
    return num_judged(sequence) > 0 or not (prospect.due or draft_of(sequence))


def _readings(sequence: Sequence) -> dict[str, Ask]:
    """What assistants are asked that have yet to read any of the draft."""
    spots = [note_of(each).spots or {} for each in draft_of(sequence)]
    return {
        member: Ask(track.num_uncached, num_reading(track, [own[member] for own in spots if member in own]))
        for member, track in list(sequence.tracks.items())[1:]
        if track.num_uncached
    }

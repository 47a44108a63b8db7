"""The verify mode: main drafts some tokens, then every assistant reads them in one forward and the ensemble decides.

A drafted token is judged where the place before it is *sound* (`places.py`), unless the assistants agree with it
anyway (it is not *needed*). The first judged token that the fusion would have chosen otherwise is replaced, and what
follows it is taken back. At all other places main's token stands. Source: SAFE (arXiv 2510.15346), docs/methods.md.

A drafted token is what main alone would choose at its place with the place's own random number, and the fusion
chooses with the same number. So a text is the very text that the rule gives one token at a time: it depends neither
on how long drafts are nor on other sequences. The more alike the distributions, the more often a draft stays.

The beat (`decoding/rhythm.py`) says whether main drafts, the assistants read, or both. Texts whose shaping depends on
the tokens before (penalties, JSON, min_tokens) step in lockstep, and so does the first token of every text.

Knows tracks, candidates and fusions; does not know scheduling or caches.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from ensemble_core.decoding import reports
from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.modes.base import MODES, Ask, Decision, Outcome, Turn, joined
from ensemble_core.decoding.modes.judging import Judged, Place, Report, is_whole, judge, probabilities, row_of
from ensemble_core.decoding.modes.lockstep import Lockstep, failed, narrow_main, width_of
from ensemble_core.decoding.modes.places import (
    Note,
    Spot,
    draft_of,
    extended,
    is_complete,
    note_of,
    num_judged,
    num_reading,
)
from ensemble_core.decoding.rhythm import LONGEST, Beat, Prospect
from ensemble_core.decoding.sampler import sample
from ensemble_core.decoding.sequence import Choice, Drafted, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Answers, Candidates


class VerifyOptions(BaseModel):
    """How drafts are made and judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft: Literal["auto"] | Annotated[int, Field(ge=1, le=16)] = Field(
        "auto",
        description="Tokens of a draft; auto: as many as pay, by main's certainty, by what stayed and by cost.",
    )
    lookup: bool = Field(
        True, description="Main is fed guesses of its next tokens, taken from where the last ones occurred before."
    )
    needed: Literal["consensus", "always"] = Field(
        "consensus",
        description="consensus: a greedy token with which the assistants agree is not fused; always: it is.",
    )


_GUESSES = 7  # at most

Ends = Mapping[str, tuple[int, Candidates]]  # assistant -> tokens of its completion, what it said behind them


@MODES.register("verify", VerifyOptions)
@dataclass(frozen=True)
class Verify:
    """See the module's docstring."""

    options: VerifyOptions = field(default_factory=VerifyOptions)

    def prospect(self, sequence: Sequence) -> Prospect | None:
        """See `Mode.prospect`."""
        if _in_lockstep(sequence):
            return None
        draft, habits, likely = draft_of(sequence), sequence.habits, 1.0
        for each in draft:
            sure = note_of(each).spots == {}  # nobody judges it
            likely *= 1.0 if sure else habits.survival(note_of(each).certainty)
        fixed = self.options.draft != "auto"
        longest = self.options.draft if isinstance(self.options.draft, int) else LONGEST
        complete = is_complete(sequence)
        guesses = sequence.drafted[len(draft) :]
        return Prospect(
            num_unread=sum(track.num_uncached for track in list(sequence.tracks.values())[1:]),
            likely=likely,
            survival=habits.average,
            due=complete or (num_judged(sequence) > 0 and (sequence.cramped or len(draft) >= longest)),
            eager=fixed and len(draft) < longest,
            complete=complete,
            free=not fixed,
            num_guessed=len(guesses),
            guess=sequence.guess_habits.survival(_strength(guesses[0])) if guesses else 0.0,
        )

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """Main's next tokens, every assistant's reading of the draft, or both."""
        prospect = self.prospect(sequence)
        if prospect is None:
            return Lockstep().plan(sequence)
        readings = _readings(sequence) if beat.read else {}
        if readings and not beat.drafts(prospect):
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
        chosen = _chosen([turn for turn in turns if turn.recipe.main in turn.feeds], answers, num_candidates)
        sampling = time.perf_counter() - started
        consensus = self.options.needed == "consensus"
        cases = [_Case(t, chosen.get(t.sequence.seq_id, [])) for t in _with_finite(turns, answers)]
        whole = [case for case in cases if case.goes_on]
        drafts = judge(
            [place for case in whole for place in _places(case.turn, answers)], num_candidates, consensus
        )
        for case in whole:
            case.read(drafts, answers)
        ends = judge([place for case in whole for place in case.front()], num_candidates, consensus)
        decisions = [self._decision(case, ends) for case in cases]
        return Outcome(decisions, drafts.fusions + ends.fusions, sampling)

    def _decision(self, case: _Case, ends: Judged) -> Decision:
        """What becomes of a turn's draft, once the places at the text's end are judged as well."""
        case.close(ends)
        if not case.goes_on:
            return _failed(case.turn)
        draft = self._with_guesses(case) if case.kept else ()
        unsound = tuple(member for member, reason in case.turn.left_out.items() if reason == "non_finite")
        return Decision(
            case.turn.sequence,
            tuple(case.choices),
            draft,
            case.ends,
            unsound,
            verdicts=tuple(case.verdicts),
            consulted=case.consulted,
        )

    def _with_guesses(self, case: _Case) -> tuple[Drafted, ...]:
        """The draft, and guesses behind it."""
        sequence, draft = case.turn.sequence, case.draft
        ids = [choice.token_id for choice in case.choices] + [each.token_id for each in draft]
        left = sequence.request.params.max_tokens - sequence.num_completion_tokens - len(ids) - 1
        ends = bool(ids) and ((bool(draft) and draft[-1].held) or sequence.stops_at(ids[-1]))
        if not self.options.lookup or sequence.cramped or ends or left <= 0:
            return draft
        length, guesses = sequence.guess(ids, min(_GUESSES, left))
        return (*draft, *(Drafted(token_id, length / 10, held=True, guess=True) for token_id in guesses))


class _Case:
    """What becomes of one turn, step by step.

    choices: tokens that become final. consulted: how many of them were fused. draft: what stays behind them. ends:
    what assistants said at the end of what they have read, if all of that stays. kept: all that was judged stays.
    goes_on: no failure.
    """

    def __init__(self, turn: Turn, chosen: list[Drafted]) -> None:
        """chosen: what main alone would choose at the positions that it was fed."""
        self.turn = turn
        self.goes_on = _can_go_on(turn) and all(each.token_id >= 0 for each in chosen)
        self.new, verdicts = _confirmed(turn.sequence, chosen)
        self.verdicts = list(verdicts)
        self.choices: list[Choice] = []
        self.draft: tuple[Drafted, ...] = ()
        self.ends: Ends | None = None
        self.kept = True
        self.consulted = 0

    def read(self, judged: Judged, answers: Mapping[str, Answers]) -> None:
        """Take the verdicts on what was read, if anything was, and let main's new tokens follow what stays."""
        sequence, draft = self.turn.sequence, draft_of(self.turn.sequence)
        spelt, rest = draft[: sequence.num_spelt], draft[sequence.num_spelt :]
        if _is_read(self.turn):
            spelt, rest = (), draft[num_judged(sequence) :]
            for number, drafted in enumerate(draft[: num_judged(sequence)]):
                self._take(number, drafted, judged)
                if not self.kept:
                    return
            self.ends = _ends(self.turn, answers)
        if self.goes_on:
            new = () if is_complete(sequence) else self.new
            self.draft = extended(sequence, spelt, (*rest, *new))

    def front(self) -> list[Place]:
        """The place at the end of the final text, if the assistants have answered there before it is drafted."""
        number, ends = len(self.choices), self.ends if self.choices or self.ends else self.turn.sequence.ends
        if not (self.goes_on and self.kept and self.draft and ends):
            return []
        assert isinstance(ends, dict)
        spots = note_of(self.draft[0]).spots or {}
        rows = {
            member: ends[member][1]
            for member in self.turn.recipe.members[1:]
            if member in spots and member in ends and ends[member][0] == spots[member].before
        }
        whole = len(rows) == len(self.turn.recipe.members) - 1
        return [Place(self.turn, number, self.draft[0], rows)] if whole and rows else []

    def close(self, judged: Judged) -> None:
        """Make final what is decided at the front of the draft: what was judged, and what nobody can judge."""
        number = len(self.choices)
        while self.goes_on and self.kept and self.draft and not self.draft[0].held:
            first = self.draft[0]
            if (self.turn.sequence.seq_id, number) not in judged.tokens and note_of(first).spots != {}:
                break
            self._take(number, first, judged)
            self.draft, self.ends, number = self.draft[1:], None, number + 1

    def _take(self, number: int, drafted: Drafted, judged: Judged) -> None:
        """Make the token at a place final, or the one that was chosen in its stead."""
        key = self.turn.sequence.seq_id, number
        token = judged.tokens.get(key, drafted.token_id)
        if token < 0:
            self.goes_on = False
            return
        self.choices.append(_choice(self.turn, drafted, token, judged.reports.get(key)))
        self.consulted += key in judged.reports
        self.kept = token == drafted.token_id
        self.verdicts.append(Verdict(note_of(drafted).certainty, self.kept))


def _in_lockstep(sequence: Sequence) -> bool:
    """Whether a sequence's next token is decided as in lockstep."""
    if sequence.drafted:
        return False
    params = sequence.request.params
    begins = sequence.num_completion_tokens == 0 or len(sequence.recipe.members) == 1
    bound = sequence.constraint is not None or sequence.num_completion_tokens < params.min_tokens
    return begins or bound or params.penalises


def _strength(guess: Drafted) -> float:
    """What a guess rests on, as a certainty."""
    assert isinstance(guess.note, float)
    return guess.note


def _readings(sequence: Sequence) -> dict[str, Ask]:
    """What assistants are asked that have yet to read any of the draft."""
    spots = [note_of(each).spots or {} for each in draft_of(sequence)]
    return {
        member: Ask(track.num_uncached, num_reading(track, [own[member] for own in spots if member in own]))
        for member, track in list(sequence.tracks.items())[1:]
        if track.num_uncached
    }


def _is_read(turn: Turn) -> bool:
    """Whether assistants were to read the draft, even if all of them are busy or have read it before."""
    main = turn.sequence.recipe.main
    return any(member != main for member in (*turn.feeds, *turn.left_out)) or is_complete(turn.sequence)


def _chosen(
    turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int
) -> dict[int, list[Drafted]]:
    """Sequence -> what main alone would choose behind its draft, and behind each guess; -1: not finite numbers."""
    groups: dict[tuple[str, int, int, bool], list[tuple[Turn, int, int]]] = {}  # turn, row of the block, ahead
    for turn in turns:
        main, ahead = turn.recipe.main, len(draft_of(turn.sequence))
        span = answers[main].spans[turn.feeds[main]]
        group = groups.setdefault((main, span.block, width_of(turn, num_candidates), is_whole(turn)), [])
        group += ((turn, row, ahead + row - span.start) for row in range(span.start, span.stop))
    chosen: dict[int, list[Drafted]] = {}
    for (main, block, _, whole), group in groups.items():
        of_rows = [turn for turn, _, _ in group]
        rows = answers[main].blocks[block].rows([row for _, row, _ in group])
        rows = rows if whole else narrow_main(of_rows, rows, num_candidates)
        sequences = [turn.sequence for turn in of_rows]
        tokens = sample(
            shape(single(rows), sequences, [None] * len(group)), sequences, [ahead for _, _, ahead in group]
        )
        for i, (token, certainty) in enumerate(zip(tokens, _certainties(rows, sequences, tokens), strict=True)):
            chosen.setdefault(sequences[i].seq_id, []).append(Drafted(token, Note(row_of(rows, i), certainty)))
    return chosen


def _confirmed(sequence: Sequence, chosen: list[Drafted]) -> tuple[list[Drafted], tuple[Verdict, ...]]:
    """What main has chosen as long as the guesses were right, and how they fared."""
    guesses = sequence.drafted[len(draft_of(sequence)) :]
    verdicts: list[Verdict] = []
    for guess, own in zip(guesses, chosen[:-1], strict=False):
        verdicts.append(Verdict(_strength(guess), guess.token_id == own.token_id, guess=True))
        if not verdicts[-1].kept:
            break
    right = sum(verdict.kept for verdict in verdicts)
    return chosen[: right + 1], tuple(verdicts)


def _certainties(rows: Candidates, sequences: abc.Sequence[Sequence], tokens: list[int]) -> list[float]:
    """How sure main was of its tokens: of a greedy one its distance to the next likeliest, else its probability."""
    sampled = probabilities(rows, torch.tensor(tokens, device=rows.token_ids.device))
    best = rows.logprobs.topk(min(2, rows.logprobs.shape[1]), dim=1).values.exp()
    margins = (2 * best[:, 0] - best.sum(dim=1)).tolist() if best.shape[1] > 1 else sampled
    return [
        margin if sequence.request.params.greedy else probability
        for sequence, margin, probability in zip(sequences, margins, sampled, strict=True)
    ]


def _with_finite(turns: abc.Sequence[Turn], answers: Mapping[str, Answers]) -> list[Turn]:
    """The turns without assistants whose numbers are not finite."""
    finite = {
        member: [block.logprobs.amax(dim=1).isfinite().tolist() for block in said.blocks]
        for member, said in answers.items()
    }
    found = []
    for turn in turns:
        spans = {m: answers[m].spans[feed] for m, feed in turn.feeds.items() if m != turn.sequence.recipe.main}
        broken = [m for m, span in spans.items() if not all(finite[m][span.block][span.start : span.stop])]
        found.append(turn.without(broken, "non_finite") if broken else turn)
    return found


def _can_go_on(turn: Turn) -> bool:
    """Whether a sequence survives the loss of those whose numbers are not finite."""
    return all(
        turn.sequence.recipe.can_lose(member) for member, reason in turn.left_out.items() if reason == "non_finite"
    )


def _places(turn: Turn, answers: Mapping[str, Answers]) -> Iterator[Place]:
    """The sound places of a draft at which all assistants have answered."""
    assistants = turn.recipe.members[1:]
    for number, drafted in enumerate(draft_of(turn.sequence)[: num_judged(turn.sequence)]):
        spots = note_of(drafted).spots or {}
        if not assistants or not all(member in spots for member in assistants):
            continue
        rows = {member: _answer(turn, member, spots[member], answers) for member in assistants}
        found = {member: row for member, row in rows.items() if row is not None}
        if len(found) == len(assistants):
            yield Place(turn, number, drafted, found)


def _answer(turn: Turn, member: str, spot: Spot, answers: Mapping[str, Answers]) -> Candidates | None:
    """What an assistant said at a spot, now or at the end of the last reading."""
    if member in turn.feeds:
        part = answers[member].of(turn.feeds[member])
        row = len(part) - 1 - len(turn.sequence.tracks[member].completion_ids) + spot.before
        if row >= 0:
            return row_of(part, row)
    known = turn.sequence.ends
    count, said = known.get(member, (-1, None)) if isinstance(known, dict) else (-1, None)
    return said if count == spot.before else None


def _failed(turn: Turn) -> Decision:
    return failed(turn, tuple(member for member, reason in turn.left_out.items() if reason == "non_finite"))


def _ends(turn: Turn, answers: Mapping[str, Answers]) -> Ends | None:
    """What every assistant said behind the text that it has read; None if one of them has not answered."""
    ends = {}
    for member, track in list(turn.sequence.tracks.items())[1:]:
        if member not in turn.feeds:
            return None
        part = answers[member].of(turn.feeds[member])
        ends[member] = len(track.completion_ids), row_of(part, len(part) - 1)
    return ends


def _choice(turn: Turn, drafted: Drafted, token: int, found: Report | None) -> Choice:
    """A final token with the reports that its request asked for; main's own numbers where nothing was fused."""
    request, main = turn.sequence.request, turn.recipe.main
    if request.params.logprobs is None and not request.trace:
        return Choice(token)
    own = note_of(drafted).main
    parts, fused, row = found if found is not None else ([own], single(own), 0)
    scored = trace = None
    if request.params.logprobs is not None:
        scored = reports.score(fused.token_ids[row], fused.logprobs[row], token, request.params.logprobs)
    if request.trace:
        members = [main, *(member for member in turn.feeds if member != main)]
        said = dict(zip(members, parts, strict=False))
        left_out = {**turn.sequence.dropped, **turn.left_out}
        trace = reports.trace(turn.sequence.recipe, turn.sequence.tracks, said, fused, row, token, left_out)
    return Choice(token, scored, trace)

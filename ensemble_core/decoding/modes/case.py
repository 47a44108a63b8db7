"""What becomes of one turn's draft: which of its tokens become final, and what stays behind them.

Knows places and what was judged of them; does not know who drafted, beats or caches.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ensemble_core.decoding import reports
from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.modes.base import Decision, Turn
from ensemble_core.decoding.modes.drafts import confirmed, with_guesses
from ensemble_core.decoding.modes.judging import Judged, Place, Report, row_of
from ensemble_core.decoding.modes.lockstep import failed
from ensemble_core.decoding.modes.places import (
    Spot,
    draft_of,
    extended,
    is_complete,
    note_of,
    num_judged,
)
from ensemble_core.decoding.requests import DraftTrace, Trace
from ensemble_core.decoding.sequence import Choice, Drafted
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Answers, Candidates

Ends = Mapping[str, tuple[int, Candidates]]  # assistant -> tokens of its completion, what it said behind them


class Case:
    """What becomes of one turn, step by step.

    choices: tokens that become final. consulted, agreed, certified: as of a decision. draft: what stays behind. ends:
    what assistants said at the end of what they have read, if all of that stays. kept: all that was judged stays.
    goes_on: no failure.
    """

    def __init__(self, turn: Turn, chosen: list[Drafted]) -> None:
        """chosen: what main alone would choose at the positions that it was fed."""
        self.turn = turn
        self.goes_on = _can_go_on(turn) and all(each.token_id >= 0 for each in chosen)
        self.new, verdicts = confirmed(turn.sequence, chosen)
        self.verdicts = list(verdicts)
        self.choices: list[Choice] = []
        self.draft: tuple[Drafted, ...] = ()
        self.ends: Ends | None = None
        self.kept = True
        self.consulted = self.agreed = self.certified = 0

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
        sequence, number = self.turn.sequence, len(self.choices)
        while self.goes_on and self.kept and self.draft and not self.draft[0].held:
            first = self.draft[0]
            waits = (sequence.seq_id, number) not in judged.tokens and note_of(first).spots != {}
            if waits and not sequence.is_bound:
                break
            self._take(number, first, judged)
            self.draft, self.ends, number = self.draft[1:], None, number + 1

    def decision(self, lookup: bool) -> Decision:
        """What the mode decides. lookup: guesses may follow the draft."""
        sequence, left_out = self.turn.sequence, self.turn.left_out
        unsound = tuple(member for member, reason in left_out.items() if reason == "non_finite")
        if not self.goes_on:
            return failed(self.turn, unsound)
        draft = self.draft if self.kept else ()
        if lookup and self.kept:
            draft = with_guesses(sequence, [choice.token_id for choice in self.choices], draft)
        return Decision(
            sequence,
            tuple(self.choices),
            draft,
            self.ends,
            unsound,
            verdicts=tuple(self.verdicts),
            consulted=self.consulted,
            agreed=self.agreed,
            certified=self.certified,
        )

    def _take(self, number: int, drafted: Drafted, judged: Judged) -> None:
        """Make the token at a place final, or the one that was chosen in its stead."""
        key = self.turn.sequence.seq_id, number
        token = judged.tokens.get(key, drafted.token_id)
        if token < 0:
            self.goes_on = False
            return
        self.choices.append(_choice(self.turn, drafted, token, judged.reports.get(key), judged.said.get(key, {})))
        fused, judgement = key in judged.reports, key in judged.tokens
        self.consulted += fused
        self.agreed += judgement and not fused
        self.certified += note_of(drafted).certified and not judgement
        self.kept = token == drafted.token_id
        self.verdicts.append(Verdict(note_of(drafted).certainty, self.kept))


def with_finite(turns: abc.Sequence[Turn], answers: Mapping[str, Answers]) -> list[Turn]:
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


def places_of(turn: Turn, answers: Mapping[str, Answers]) -> Iterator[Place]:
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


def _can_go_on(turn: Turn) -> bool:
    """Whether a sequence survives the loss of those whose numbers are not finite."""
    return all(
        turn.sequence.recipe.can_lose(member) for member, reason in turn.left_out.items() if reason == "non_finite"
    )


def _is_read(turn: Turn) -> bool:
    """Whether assistants were to read the draft, even if all of them are busy or have read it before."""
    main = turn.sequence.recipe.main
    return any(member != main for member in (*turn.feeds, *turn.left_out)) or is_complete(turn.sequence)


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


def _ends(turn: Turn, answers: Mapping[str, Answers]) -> Ends | None:
    """What every assistant said behind the text that it has read; None if one of them was not asked."""
    ends = {}
    for member in turn.recipe.members[1:]:
        if member not in turn.feeds:
            return None
        part = answers[member].of(turn.feeds[member])
        ends[member] = len(turn.sequence.tracks[member].completion_ids), row_of(part, len(part) - 1)
    return ends or None


def _choice(
    turn: Turn, drafted: Drafted, token: int, found: Report | None, said: Mapping[str, Candidates]
) -> Choice:
    """A final token with the reports that its request asked for; main's own numbers where nothing was fused.

    said: what assistants said at its place.
    """
    request, own = turn.sequence.request, note_of(drafted).main
    fused, row = (found[1], found[2]) if found is not None else (single(own), 0)
    scored = trace = None
    if request.params.logprobs is not None:
        scored = reports.score(fused.token_ids[row], fused.logprobs[row], token, request.params.logprobs)
    if request.trace:
        trace = _trace(turn, drafted, token, found, {turn.recipe.main: own, **said})
    return Choice(token, scored, trace)


def _trace(
    turn: Turn, drafted: Drafted, token: int, found: Report | None, said: Mapping[str, Candidates]
) -> Trace:
    """What is told of a token that was drafted. said: what members said, main first, one row each."""
    sequence, note = turn.sequence, note_of(drafted)
    fused, row = (found[1], found[2]) if found is not None else (single(note.main), 0)
    whole = replace(fused, token_ids=fused.token_ids[row : row + 1], logprobs=fused.logprobs[row : row + 1])
    left_out = {**sequence.dropped, **turn.left_out}
    trace = reports.trace(sequence.recipe, sequence.tracks, said, whole, 0, token, left_out)
    draft = DraftTrace(
        token=sequence.main.vocabulary.name_of(drafted.token_id),
        drafter="lookup" if note.guessed else "main",
        sound=note.sound,
        needed=found is not None,
        certified=note.certified,
        kept=token == drafted.token_id,
    )
    weights = trace.weights if found is not None else {turn.recipe.main: 1.0}
    return replace(trace, draft=draft, consulted=found is not None, weights=weights)

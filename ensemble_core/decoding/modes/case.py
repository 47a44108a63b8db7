"""What becomes of one turn's draft: which of its tokens become final, and what stays behind them.

Knows places and what was judged of them; does not know who drafted, beats or caches.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping

from ensemble_core.decoding import reports
from ensemble_core.decoding.habits import Verdict
from ensemble_core.decoding.modes.base import Decision, Turn
from ensemble_core.decoding.modes.drafts import confirmed, with_guesses
from ensemble_core.decoding.modes.judging import Judged, Place, PlaceReport, row_of
from ensemble_core.decoding.modes.lockstep import failed
from ensemble_core.decoding.modes.places import (
    Spot,
    draft_of,
    extended,
    is_complete,
    note_of,
    num_judged,
)
from ensemble_core.decoding.requests import DraftTrace
from ensemble_core.decoding.sequence import Choice, Drafted, Sequence
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Answers, Candidates

Ends = Mapping[str, tuple[int, Candidates]]  # assistant -> tokens of its completion, what it said behind them


class Case:
    """What becomes of one turn, step by step.

    choices: tokens that become final. consulted, agreed, certified: as of a decision. draft: what stays behind. ends:
    what assistants said at the end of what they have read, if all of that stays. kept: all that was judged stays.
    goes_on: no failure. source: of guesses.
    """

    source = "lookup"

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

    def places(self, answers: Mapping[str, Answers]) -> Iterator[Place]:
        """The sound places of what was drafted before at which all assistants have answered."""
        return places_of(self.turn, answers)

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
        sequence = self.turn.sequence
        if not self.goes_on:
            return failed(self.turn, self.turn.non_finite)
        draft = self.draft if self.kept else ()
        if lookup and self.kept:
            draft = with_guesses(sequence, [choice.token_id for choice in self.choices], draft)
        return Decision(
            sequence,
            tuple(self.choices),
            draft,
            self.ends,
            self.turn.non_finite,
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
        drafter = self.source if note_of(drafted).guessed else "main"
        found, said = judged.reports.get(key), judged.said.get(key, {})
        self.choices.append(_choice(self.turn, drafted, drafter, token, found, said))
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
    return all(turn.sequence.recipe.can_lose(member) for member in turn.non_finite)


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
    turn: Turn,
    drafted: Drafted,
    drafter: str,
    token: int,
    found: PlaceReport | None,
    said: Mapping[str, Candidates],
) -> Choice:
    """A final token with the reports that its request asked for; main's own numbers where nothing was fused.

    said: what assistants said at its place, of traced requests.
    """
    sequence, own = turn.sequence, note_of(drafted).main
    parts, fused, row = [own, *said.values()], single(own), 0
    if found is not None:
        parts, fused, row = found.parts, found.fused, found.row
    trace = None
    scored = reports.scored(sequence.request.params, fused, row, token, note_of(drafted).named)
    if sequence.request.trace:
        members = dict(zip((turn.recipe.main, *said), parts, strict=True))
        left_out = {**sequence.dropped, **turn.left_out}
        draft = _fate(sequence, drafted, drafter, token, found is not None)
        weights = () if found is None else found.weights
        trace = reports.trace(
            sequence.recipe, sequence.tracks, members, fused, row, token, left_out, draft, weights
        )
    return Choice(token, scored, trace)


def _fate(sequence: Sequence, drafted: Drafted, drafter: str, token: int, needed: bool) -> DraftTrace:
    """What became of a drafted token. needed: the fusion decided."""
    note = note_of(drafted)
    return DraftTrace(
        token=sequence.main.vocabulary.name_of(drafted.token_id),
        drafter=drafter,
        sound=note.sound,
        needed=needed,
        certified=note.certified,
        kept=token == drafted.token_id,
    )

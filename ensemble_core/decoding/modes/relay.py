"""Verify with an assistant as drafter: it writes on in its own tokens, and main reads them as guesses.

In each step the drafter adds a token to the text *ahead* of main; then main is fed all of it at once and says what it
would have chosen itself. So an expensive main answers once for a whole draft, and a text is the one that any drafter
gives. What assistants say at places to come is kept, so where main follows its drafter, the drafter need not read.

Where an answer that was passed by is missing, the draft is taken back to there: main makes it again, and everybody
answers at its end. Knows tracks and candidates; does not know fusions, costs or caches.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ensemble_core.decoding.modes.base import Ask, Decision, Turn
from ensemble_core.decoding.modes.case import Case
from ensemble_core.decoding.modes.drafts import certainties, spelt_guesses
from ensemble_core.decoding.modes.judging import Judged, Place, row_of
from ensemble_core.decoding.modes.places import Spot, draft_of, extended, is_complete, likely_to_stay, note_of
from ensemble_core.decoding.rhythm import FURTHEST, Beat, Prospect
from ensemble_core.decoding.sampler import sample
from ensemble_core.decoding.sequence import Ahead, Drafted, Sequence
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Answers, Candidates, stacked

_KEPT = 64  # answers of an assistant that are kept


@dataclass(frozen=True, slots=True)
class Said:
    """What an assistant said in a completion of these ids. rows: how many lie before -> what it said there."""

    ids: abc.Sequence[int]
    rows: Mapping[int, Candidates]

    def at(self, before: int, ids: abc.Sequence[int]) -> Candidates | None:
        """What it said behind the first `before` of these ids."""
        known = before in self.rows and self.ids[:before] == ids[:before]
        return self.rows[before] if known else None

    def passed(self, before: int, ids: abc.Sequence[int]) -> bool:
        """Whether it has read these, so that it will not say again what it says there."""
        return before < len(self.ids) and self.ids[:before] == ids[:before]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of the drafter: its text, and how sure the drafter was of it."""

    text: str
    certainty: float


@dataclass(frozen=True, slots=True)
class Lead:
    """What is kept of a draft ahead. said: by assistants. closed: nothing can be drafted behind the pieces."""

    said: Mapping[str, Said] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token that the drafter would write at the end of what it has read; None: nothing that can be drafted."""

    piece: Piece | None


def lead_of(ahead: Ahead | None) -> Lead:
    """What is kept of a draft ahead."""
    note = ahead.note if ahead is not None else None
    return note if isinstance(note, Lead) else Lead()


def prospect(sequence: Sequence, drafter: str, longest: int, fixed: bool) -> Prospect:
    """What an assistant's draft promises: main is among those that have to read it.

    longest: tokens at most. fixed: neither more nor less, if it can be.
    """
    lead, unread = lead_of(sequence.ahead), {m: track.num_uncached for m, track in sequence.tracks.items()}
    likely = likely_to_stay(sequence)
    for piece in lead.pieces:
        likely *= sequence.guess_habits.survival(piece.certainty)
    full = len(lead.pieces) >= longest
    complete = lead.closed or full or is_complete(sequence) or not unread[drafter]
    others = sum(count for member, count in unread.items() if member != drafter)
    return Prospect(
        num_unread=others,
        likely=likely,
        survival=sequence.habits.average * sequence.guess_habits.average,
        due=complete or others >= FURTHEST,
        eager=fixed and not complete,
        complete=complete,
        free=not fixed,
    )


def plan(sequence: Sequence, drafter: str, beat: Beat, promise: Prospect) -> Mapping[str, Ask]:
    """The drafter's next token, or what main and the other assistants say to what it has drafted."""
    asks, ended, drafts = dict[str, Ask](), is_complete(sequence), beat.drafts(promise)
    if not ended and (beat.read or not drafts):
        asks[sequence.recipe.main] = Ask(sequence.main.num_uncached, 1 + sequence.num_guessed)
    for member in sequence.recipe.members[1:]:
        called = drafts or _is_waiting(sequence, drafter) if member == drafter else beat.read
        if (called or ended) and sequence.tracks[member].num_uncached:
            asks[member] = _reading(sequence, member)
    return asks


def _is_waiting(sequence: Sequence, drafter: str) -> bool:
    """Whether the drafter has yet to read something that main has written otherwise."""
    unread = sequence.tracks[drafter].num_uncached > 0
    return bool(draft_of(sequence)) and not sequence.ahead_of(drafter) and unread


def _reading(sequence: Sequence, member: str) -> Ask:
    """What an assistant is asked: to read all it has not, and to answer wherever a place may come to be."""
    track, spell = sequence.tracks[member], sequence.main.vocabulary.text_bytes
    rest = len(sequence.ahead_of(member).encode()) + sum(len(spell(each.token_id)) for each in draft_of(sequence))
    wanted, ids = 1, track.completion_ids
    while rest > 0 and wanted <= len(ids):
        rest -= len(track.vocabulary.text_bytes(ids[-wanted]))
        wanted += 1
    return Ask(track.num_uncached, min(wanted, track.num_uncached))


def proposed(turns: abc.Sequence[tuple[Turn, str]], answers: Mapping[str, Answers]) -> dict[int, Proposal]:
    """Sequence -> what its drafter would write behind what it has read now. turns: with the drafter of each."""
    groups: dict[tuple[str, int], list[Turn]] = {}
    for turn, drafter in turns:
        if drafter in turn.feeds:
            part = answers[drafter].of(turn.feeds[drafter])
            groups.setdefault((drafter, part.token_ids.shape[1]), []).append(turn)
    found: dict[int, Proposal] = {}
    for (drafter, _), group in groups.items():
        parts = [answers[drafter].of(turn.feeds[drafter]) for turn in group]
        rows = stacked([row_of(part, len(part) - 1) for part in parts])
        sequences = [turn.sequence for turn in group]
        tokens = sample(single(rows), sequences, [len(sequence.drafted) for sequence in sequences])
        sure = certainties(rows, sequences, tokens)
        for sequence, token, certainty in zip(sequences, tokens, sure, strict=True):
            found[sequence.seq_id] = Proposal(_piece(sequence, drafter, token, certainty))
    return found


def _piece(sequence: Sequence, drafter: str, token: int, certainty: float) -> Piece | None:
    vocabulary = sequence.tracks[drafter].vocabulary
    if token < 0 or token in vocabulary.special_ids or token in vocabulary.stop_ids:
        return None
    try:
        text = vocabulary.text_bytes(token).decode()
    except UnicodeDecodeError:
        return None  # a part of a character
    return Piece(text, certainty) if text else None


class RelayCase(Case):
    """What becomes of a turn whose drafter is an assistant."""

    def __init__(
        self,
        turn: Turn,
        chosen: list[Drafted],
        drafter: str,
        proposal: Proposal | None,
        answers: Mapping[str, Answers],
    ) -> None:
        """proposal: what the drafter would write next, if it was fed."""
        super().__init__(turn, chosen)
        self.source = self._drafter = drafter
        self._proposal = proposal
        self._is_stuck = False
        self._said = dict(lead_of(turn.sequence.ahead).said)
        for member in turn.recipe.members[1:]:
            if member in turn.feeds:
                self._said[member] = self._heard(member, answers)

    def places(self, answers: Mapping[str, Answers]) -> Iterator[Place]:
        """None: what was drafted before is judged together with what is new."""
        return iter(())

    def read(self, judged: Judged, answers: Mapping[str, Answers]) -> None:
        """Let main's new tokens follow the draft: all of it is judged where everybody has spoken."""
        sequence, draft = self.turn.sequence, draft_of(self.turn.sequence)
        new = () if is_complete(sequence) else self.new
        spelt, rest = draft[: sequence.num_spelt], draft[sequence.num_spelt :]
        self.draft = extended(sequence, spelt, (*rest, *new))

    def front(self) -> list[Place]:
        """The places of the draft's first tokens up to one at which somebody has yet to speak."""
        places: list[Place] = []
        if not (self.goes_on and self.draft):
            return places
        spelling = self._spelling()
        for number, drafted in enumerate(self.draft):
            spots = note_of(drafted).spots
            if drafted.held or spots is None:
                break
            if not spots:
                continue
            rows = {m: self._row(m, spots[m], spelling[m]) for m in self.turn.recipe.members[1:] if m in spots}
            found = {member: row for member, row in rows.items() if row is not None}
            if len(found) < len(self.turn.recipe.members) - 1:
                if self._is_passed(spots, found, spelling):
                    self.draft, self._is_stuck = self.draft[:number], True
                break
            places.append(Place(self.turn, number, drafted, found))
        return places

    def decision(self, lookup: bool) -> Decision:
        """What the mode decides, with the text ahead of main and the guesses that it makes."""
        decision = super().decision(lookup=False)
        if decision.error is not None:
            return decision
        ahead = self._ahead(decision)
        draft = decision.draft
        if ahead is not None and ahead.text:
            pieces = [(piece.text, piece.certainty) for piece in lead_of(ahead).pieces]
            draft = (*draft, *spelt_guesses(self.turn.sequence, len(decision.tokens), draft, pieces))
        return replace(decision, draft=draft, ahead=ahead)

    def _heard(self, member: str, answers: Mapping[str, Answers]) -> Said:
        """What an assistant has said, now and before."""
        ids = list(self.turn.sequence.tracks[member].completion_ids)
        part, known = answers[member].of(self.turn.feeds[member]), self._said.get(member)
        rows = {}
        if known is not None:
            rows = {before: row for before, row in known.rows.items() if known.at(before, ids) is not None}
        first = len(ids) + 1 - len(part)
        rows |= {first + i: row_of(part, i) for i in range(len(part)) if first + i >= 0}
        return Said(ids, {before: rows[before] for before in sorted(rows)[-_KEPT:]})

    def _spelling(self) -> dict[str, abc.Sequence[int]]:
        """How assistants spell the text with the draft."""
        tracks = list(self.turn.sequence.tracks.items())[1:]
        text = self._text([each.token_id for each in self.draft if not each.held])[0]
        return {member: track.spelling(text)[1] for member, track in tracks}

    def _text(self, more: abc.Sequence[int]) -> tuple[str, bool]:
        return self.turn.sequence.spelling_of(0, tuple(more))

    def _row(self, member: str, spot: Spot, ids: abc.Sequence[int]) -> Candidates | None:
        said = self._said.get(member)
        return said.at(spot.before, ids) if said is not None else None

    def _is_passed(
        self, spots: Mapping[str, Spot], found: Mapping[str, Candidates], spelling: Mapping[str, abc.Sequence[int]]
    ) -> bool:
        """Whether an answer is missing that will not come."""
        missing = [m for m in self.turn.recipe.members[1:] if m not in found and m in self._said]
        return any(self._said[m].passed(spots[m].before, spelling[m]) for m in missing if m in spots)

    def _ahead(self, decision: Decision) -> Ahead | None:
        """What is left of the text ahead behind what main has written, with the drafter's new token.

        None where everybody is to answer anew at the end.
        """
        if self._is_stuck:
            return None
        sequence, lead = self.turn.sequence, lead_of(self.turn.sequence.ahead)
        pieces, closed = list(lead.pieces), lead.closed
        if self._proposal is not None:
            closed = self._proposal.piece is None
            pieces += [self._proposal.piece] if self._proposal.piece is not None else []
        old = sequence.spelling[0]
        written, within = self._text(
            [*(choice.token_id for choice in decision.tokens), *(each.token_id for each in decision.draft)]
        )
        held = within or any(each.held for each in decision.draft) or sequence.cramped or sequence.is_bound
        whole = old + "".join(piece.text for piece in pieces)
        if held or not self.kept or not whole.startswith(written):
            pieces, closed = [], False
        else:
            pieces = _behind(pieces, len(written) - len(old))
        closed = closed or self._drafter in self.turn.left_out
        text = "".join(piece.text for piece in pieces)
        return Ahead(self._drafter, text, Lead(self._said, tuple(pieces), closed))


def _behind(pieces: list[Piece], chars: int) -> list[Piece]:
    """The pieces without the first so many characters."""
    rest = []
    for piece in pieces:
        if chars < len(piece.text):
            rest.append(replace(piece, text=piece.text[max(chars, 0) :]))
        chars -= len(piece.text)
    return rest

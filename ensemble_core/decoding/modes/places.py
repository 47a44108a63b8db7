"""The places of a draft: where assistants and main have a token boundary in common.

The place before a drafted token is *sound* if a character and a token of every assistant end there, in the spelling
of the text with that token, or with those after it that complete its last character; if the text ends before that,
in the spelling of the text before it. So whether it is sound depends on the text alone, never on how far somebody
drafted or when it is judged.

A longer draft is spelt as a whole. In rare cases that moves a boundary which an earlier place relies on; then the new
token is *held*: assistants do not spell it until what was drafted before is judged. So is a token with which the text
is too long for an assistant: if nothing is before it, the engine lets that assistant go. So who judges a place, too,
depends on the text alone.

Behind the draft may be guesses: tokens that main has yet to choose itself. Assistants never spell them.

Knows tracks; does not know candidates, fusions or modes.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ensemble_core.decoding.reports import Named
from ensemble_core.decoding.sequence import Drafted, Sequence
from ensemble_core.members.base import Candidates
from ensemble_core.text.alignment import Track


@dataclass(frozen=True, slots=True)
class Spot:
    """A place in an assistant's completion: how many tokens lie before it, and the token that follows, if any."""

    before: int
    following: int | None


@dataclass(frozen=True, slots=True)
class Note:
    """What is kept of a drafted token.

    main: what main said at its place, one row. certainty: how sure main was of the token. spots: assistant -> its
    spot; empty: nobody judges the token; None: not known before the character is complete. certified: no assistant
    could change it. sound: the place is, as far as known. guessed: main was fed the token before it chose it. named:
    what main said of ids that the request names.
    """

    main: Candidates
    certainty: float
    spots: Mapping[str, Spot] | None = None
    certified: bool = False
    sound: bool = False
    guessed: bool = False
    named: Named | None = None


def note_of(drafted: Drafted) -> Note:
    """The note of a drafted token that is no guess."""
    assert isinstance(drafted.note, Note)
    return drafted.note


def draft_of(sequence: Sequence) -> tuple[Drafted, ...]:
    """What main has drafted, without guesses."""
    return sequence.drafted[: len(sequence.drafted) - sequence.num_guessed]


def is_complete(sequence: Sequence) -> bool:
    """Whether nothing can be drafted before what is drafted is judged."""
    count = len(sequence.drafted) - sequence.num_guessed
    last = sequence.drafted[count - 1] if count else None
    return last is not None and (last.held or _ends(sequence, last.token_id, count))


def num_judged(sequence: Sequence) -> int:
    """How many drafted tokens a reading decides: what is spelt, and a character that will never be complete."""
    count = len(sequence.drafted) - sequence.num_guessed
    if count and not sequence.drafted[count - 1].held and is_complete(sequence):
        return count
    return sequence.num_spelt if count else 0


def likely_to_stay(sequence: Sequence) -> float:
    """How likely all that main has drafted is to stay."""
    likely = 1.0
    for each in draft_of(sequence):
        sure = note_of(each).spots == {}  # nobody judges it
        likely *= 1.0 if sure else sequence.habits.survival(note_of(each).certainty)
    return likely


def num_reading(track: Track, places: abc.Iterable[Spot]) -> int:
    """The last positions at which an assistant must answer for these places and for the text's end."""
    first = min((spot.before for spot in places), default=len(track.completion_ids))
    return min(1 + len(track.completion_ids) - first, track.num_uncached)


def extended(sequence: Sequence, draft: abc.Sequence[Drafted], more: abc.Iterable[Drafted]) -> tuple[Drafted, ...]:
    """`draft` with `more` of main's tokens behind it, as far as they can be drafted before it is judged.

    The assistants' tracks must spell what is final and drafted up to the end of `draft`; if it is empty, up to where
    the final text is about to end.
    """
    growth = _Growth(sequence, draft)
    for each in more:
        if not growth.add(each):
            break
    return (*growth.done, *growth.pending)


class _Growth:
    """A draft that grows token by token. done: tokens with known spots. pending: those of an incomplete character."""

    def __init__(self, sequence: Sequence, draft: abc.Sequence[Drafted]) -> None:
        self.done, self.pending = list(draft), list[Drafted]()
        self._sequence, self._num_spelt, self._added = sequence, sequence.num_spelt, list[int]()
        self._text, self._begins_within = sequence.spelling_of(self._num_spelt)
        self._wordings = {member: _Wording(track) for member, track in list(sequence.tracks.items())[1:]}
        if sequence.ahead is not None:
            self._wordings[sequence.ahead.member].become(self._text)
        for each in draft:
            self._rely(each)

    def add(self, drafted: Drafted) -> bool:
        """Add main's next token; returns whether another may follow."""
        self._added.append(drafted.token_id)
        self.pending.append(replace(drafted, held=False))
        text, within = self._sequence.spelling_of(self._num_spelt, tuple(self._added))
        ends = _ends(self._sequence, drafted.token_id, self._num_spelt + len(self._added))
        if within:
            ends = ends or self._sequence.is_bound
            if ends:
                self._settle(self._text)
            return not ends
        if any(wording.breaks(text) or not wording.track.holds(text) for wording in self._wordings.values()):
            self.pending = [replace(each, held=True) for each in self.pending]
            return False
        for wording in self._wordings.values():
            wording.become(text)
        self._settle(text)
        return not ends

    def _settle(self, text: str) -> None:
        """Say where the pending tokens stand in the spelling of `text`: all but the first within a character."""
        num_bytes = len(text[len(self._text) :].encode())
        spots = {member: wording.spot(num_bytes) for member, wording in self._wordings.items()}
        found = {member: spot for member, spot in spots.items() if spot is not None}
        sound = not self._begins_within and len(found) == len(spots)
        judged = sound and not note_of(self.pending[0]).certified
        first = _placed(self.pending[0], found if judged else {}, sound)
        self._rely(first)
        self.done += (first, *(_placed(each, {}) for each in self.pending[1:]))
        self.pending, self._text, self._begins_within = [], text, False

    def _rely(self, drafted: Drafted) -> None:
        for member, spot in (note_of(drafted).spots or {}).items():
            if member in self._wordings:
                self._wordings[member].relied = spot.before


class _Wording:
    """How an assistant spells the text while a draft grows. relied: tokens that must stay what they are."""

    def __init__(self, track: Track) -> None:
        self.relied = 0
        self.track = track
        self._ids, self._same = track.completion_ids, len(track.completion_ids)  # same: those that the track has

    def breaks(self, text: str) -> bool:
        """Whether the spelling of `text` has other tokens before a place that was relied on."""
        same, ids = self.track.spelling(text)
        start = min(same, self._same, self.relied)
        return ids[start : self.relied] != self._ids[start : self.relied]

    def become(self, text: str) -> None:
        """Spell `text` from now on."""
        self._same, self._ids = self.track.spelling(text)

    def spot(self, num_bytes: int) -> Spot | None:
        """The place so many bytes before the end; None if no token ends there."""
        spell, count, ids = self.track.vocabulary.text_bytes, 0, self._ids
        while num_bytes > 0 and count < len(ids):
            count += 1
            num_bytes -= len(spell(ids[-count]))
        return Spot(len(ids) - count, ids[-count] if count else None) if num_bytes == 0 else None


def _placed(drafted: Drafted, spots: Mapping[str, Spot], sound: bool = False) -> Drafted:
    return replace(drafted, note=replace(note_of(drafted), spots=spots, sound=sound))


def _ends(sequence: Sequence, token_id: int, length: int) -> bool:
    """Whether the text ends with this token, the last of so many that are not final."""
    return (
        sequence.stops_at(token_id)
        or sequence.num_completion_tokens + length >= sequence.request.params.max_tokens
    )

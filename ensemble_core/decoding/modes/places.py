"""The places of a draft: where assistants and main have a token boundary in common.

The place before a drafted token is *sound* if a character and a token of every assistant end there, in the spelling
of the text with that token, or with those after it that complete its last character; if the text ends before that,
in the spelling of the text before it. So whether it is sound depends on the text alone, never on how far somebody
drafted or when it is judged.

A longer draft is spelt as a whole. In rare cases that moves a boundary which an earlier place relies on; then the new
token is *held*: assistants do not spell it until what was drafted before is judged.

Knows tracks; does not know candidates, fusions or modes.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    spot; empty: the place is not sound; None: not known before the character is complete.
    """

    main: Candidates
    certainty: float
    spots: Mapping[str, Spot] | None = None


def note_of(drafted: Drafted) -> Note:
    """The note of a drafted token."""
    assert isinstance(drafted.note, Note)
    return drafted.note


def located(sequence: Sequence) -> tuple[Drafted, ...]:
    """The draft, with the spots of each place that is known now.

    To be called before anything follows the last token: its spots depend on the spelling that ends with it.
    """
    num_spelt, ends = sequence.num_spelt, is_complete(sequence)
    draft = []
    for number, each in enumerate(sequence.drafted):
        note, spots = note_of(each), None
        if note.spots is None and number < num_spelt:
            spots = _spots(sequence, number, num_spelt)
        elif note.spots is None and number == num_spelt and ends and not each.held:
            spots = _spots(sequence, number, number)
        draft.append(each if spots is None else replace(each, note=replace(note, spots=spots)))
    return tuple(draft)


def is_complete(sequence: Sequence) -> bool:
    """Whether nothing can be drafted before what is drafted is judged."""
    if not sequence.drafted:
        return False
    length = sequence.num_completion_tokens + len(sequence.drafted)
    last = sequence.drafted[-1]
    return last.held or sequence.stops_at(last.token_id) or length >= sequence.request.params.max_tokens


def num_judged(sequence: Sequence) -> int:
    """How many drafted tokens a reading decides: what is spelt, and a character that will never be complete."""
    if is_complete(sequence) and not sequence.drafted[-1].held:
        return len(sequence.drafted)
    return sequence.num_spelt


def hold(sequence: Sequence, draft: tuple[Drafted, ...], token_id: int) -> bool:
    """Whether `token_id` behind the draft must be held. draft: as `located` gave it."""
    relied = [note_of(each).spots for each in draft]
    if not any(relied):
        return False
    text, mid_character = sequence.spelling_of(len(draft), (token_id,))
    if mid_character:
        return False
    return any(
        sequence.tracks[member].foresee(text) < spot.before
        for member in list(sequence.tracks)[1:]
        if (spot := next((spots[member] for spots in reversed(relied) if spots and member in spots), None))
    )


def held(draft: tuple[Drafted, ...], num_spelt: int) -> tuple[Drafted, ...]:
    """The draft with everything behind the first `num_spelt` tokens held."""
    return (*draft[:num_spelt], *(replace(each, held=True) for each in draft[num_spelt:]))


def num_reading(track: Track, places: abc.Iterable[Spot]) -> int:
    """The last positions at which an assistant must answer for these places and for the text's end."""
    first = min((spot.before for spot in places), default=len(track.completion_ids))
    return min(1 + len(track.completion_ids) - first, track.num_uncached)


def _spots(sequence: Sequence, number: int, num_spelt: int) -> dict[str, Spot]:
    """The spots of the place before a drafted token; empty if it is not sound."""
    before, within = sequence.spelling_of(number)
    if within:
        return {}
    text, _ = sequence.spelling_of(num_spelt)
    rest = len(text[len(before) :].encode())
    spots: dict[str, Spot] = {}
    for member, track in list(sequence.tracks.items())[1:]:
        count = _behind(track, rest)
        if count is None:
            return {}
        following = track.completion_ids[-count] if count else None
        spots[member] = Spot(len(track.completion_ids) - count, following)
    return spots


def _behind(track: Track, num_bytes: int) -> int | None:
    """How many of a track's last tokens spell exactly so many bytes; the fewest."""
    spell, count = track.vocabulary.text_bytes, 0
    while num_bytes > 0 and count < len(track.completion_ids):
        count += 1
        num_bytes -= len(spell(track.completion_ids[-count]))
    return count if num_bytes == 0 else None

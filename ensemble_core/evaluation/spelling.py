"""How each member tokenizes documents: which tokens are scored, and where several members have a token boundary.

A place in the text is given by the number of bytes that follow it, as in `decoding/scoring.py`, since some tokenizers
put a space in front. Invariant: all members are scored over the same bytes. For a whole document these start at the
first place where every member has a boundary after some token (a member without BOS cannot score the first token).
For an answer they are its own bytes, plus the rest of the token if a member has no boundary at the first byte.
Knows tokens; does not know models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_core.text.alignment import Track, plain_text, rests


@dataclass(frozen=True, slots=True)
class Document:
    """A text to score. start: bytes of a leading prompt, not scored; origin: where the text comes from."""

    text: str
    start: int = 0
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One position of one member: after some token, with the next token known.

    rest: bytes of text after the position. scored: the next token counts. met: another member also has a boundary
    here.
    """

    rest: int
    next_id: int
    scored: bool
    met: bool


@dataclass(frozen=True, slots=True)
class Spelling:
    """One member's tokens of a document, and its rows from position `first` to the second to last."""

    token_ids: list[int]
    first: int
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class SpeltDocument:
    """A document in every member's tokens. num_bytes: scored bytes; 0 if the members share no place."""

    num_bytes: int
    spellings: dict[str, Spelling]


def spell(document: Document, tracks: Mapping[str, Track]) -> SpeltDocument:
    """The rows of every member. tracks: the whole text as each member's prompt."""
    ends = {member: rests(track) for member, track in tracks.items()}
    last = {member: _last_rows(places) for member, places in ends.items()}
    same = len({plain_text(track).removeprefix(b" ") for track in tracks.values()}) == 1
    num_bytes = len(document.text.encode()) - document.start
    if document.start == 0:
        shared = set.intersection(*(set(rows) for rows in last.values())) if same else set()
        num_bytes = min(num_bytes, max(shared, default=0))
    scored = {member: _scored(track, ends[member], num_bytes) for member, track in tracks.items()}
    begin = max((ends[m][tokens[0] - 1] for m, tokens in scored.items() if tokens), default=0)
    spellings = {}
    for member, track in tracks.items():
        others = [last[other] for other in last if other != member and same]
        first = max((row for rest, row in last[member].items() if rest >= begin), default=0)
        rows = _rows(track.prompt_ids, ends[member], first, set(scored[member]), others)
        spellings[member] = Spelling(track.prompt_ids, first, _once(rows))
    return SpeltDocument(num_bytes, spellings)


def _last_rows(ends: list[int]) -> dict[int, int]:
    """Place -> the last position there, for positions that are followed by text."""
    return {rest: row for row, rest in enumerate(ends[:-1]) if rest > 0}


def _scored(track: Track, ends: list[int], num_bytes: int) -> list[int]:
    """Indices of tokens that spell part of the last `num_bytes` bytes and have a token before them."""
    spelt = [bool(track.vocabulary.text_bytes(token_id)) for token_id in track.prompt_ids]
    return [t for t in range(1, len(ends)) if spelt[t] and ends[t] < num_bytes]


def _rows(
    ids: list[int], ends: list[int], first: int, scored: set[int], others: list[dict[int, int]]
) -> list[Row]:
    return [
        Row(ends[row], ids[row + 1], row + 1 in scored, any(ends[row] in places for places in others))
        for row in range(first, len(ids) - 1)
    ]


def _once(rows: list[Row]) -> list[Row]:
    """If several positions are at one place (with control tokens between them), only the last is `met`."""
    last = {row.rest: index for index, row in enumerate(rows)}
    return [
        row if not row.met or last[row.rest] == index else Row(row.rest, row.next_id, row.scored, met=False)
        for index, row in enumerate(rows)
    ]

"""Teacher-forced fused log-probabilities of a prompt: what the ensemble gives each of its tokens.

During prefill every member answers at every position. At a shared position, where every assistant has a token
boundary too, main's answer is fused with the assistants' answers at the same place in the text. Elsewhere main
decides alone. Positions are fused in blocks once all their answers have arrived, no more at a time than the caller
allows; used answers are dropped. A place is counted in bytes of the text without control tokens, from the end, since
some tokenizers put a space before the text. If the members otherwise spell different bytes (one reads a control token
as text), main decides alone everywhere.

Knows candidates and recipes; does not know schedules, engines or outputs.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ensemble_core.decoding.logprobs import Scored, describe_token
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.reports import score
from ensemble_core.decoding.requests import TokenLogprob
from ensemble_core.decoding.weights import weights_at
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Candidates, stacked
from ensemble_core.text.alignment import Track, plain_text, rests

_BLOCK = 64  # positions fused at once


@dataclass(slots=True)
class _AnsweredRows:
    """A member's answers from row `first` of its prompt on."""

    first: int = 0
    parts: list[Candidates] = field(default_factory=list)

    @property
    def end(self) -> int:
        """One past the last row that is held."""
        return self.first + sum(len(part) for part in self.parts)

    def rows(self, rows: Sequence[int]) -> Candidates:
        """The answers for the given rows of the prompt."""
        if len(self.parts) > 1:
            self.parts = [stacked(self.parts)]
        return self.parts[0].rows([row - self.first for row in rows])

    def drop(self, end: int) -> None:
        """Drop parts that lie wholly before row `end`."""
        while self.parts and self.first + len(self.parts[0]) <= end:
            self.first += len(self.parts.pop(0))


@dataclass(slots=True)
class _Run:
    """Places that consult the same members, in text order; those in [num_fused, num_ready) can be fused now."""

    places: list[dict[str, int]]
    num_ready: int = 0
    num_fused: int = 0

    def look(self, answers: dict[str, _AnsweredRows]) -> int:
        """Number of places to fuse now. Rows rise from place to place, so the first incomplete one is the end."""
        ends = {member: each.end for member, each in answers.items()}
        for place in self.places[self.num_ready :]:
            if any(row >= ends.get(member, 0) for member, row in place.items()):
                break
            self.num_ready += 1
        return self.num_ready - self.num_fused


@dataclass(slots=True)
class PromptScores:
    """The scores of one sequence's prompt, in progress.

    described: empty until `finish`, then an entry for every prompt token, the first without a number. num_ready:
    positions that `advance` could have fused but left because of its limit. ranks: whether they are asked for.
    """

    num_top: int
    ranks: bool = False
    described: tuple[TokenLogprob, ...] = ()
    num_ready: int = 0
    _answers: dict[str, _AnsweredRows] = field(default_factory=dict)
    _runs: tuple[_Run, ...] = ()
    _scored: dict[int, Scored] = field(default_factory=dict)

    def add(self, member: str, candidates: Candidates) -> None:
        """Add a member's answers for the next positions of its prompt."""
        self._answers.setdefault(member, _AnsweredRows()).parts.append(candidates)

    def advance(self, recipe: Recipe, tracks: dict[str, Track], limit: int | None = None) -> int:
        """Fuse up to `limit` positions (None: all) whose answers have arrived; returns how many."""
        before = len(self._scored)
        if not self._runs:
            self._runs = self._places(recipe, tracks)
        for run in self._runs:
            stop = run.num_fused + run.look(self._answers)
            if limit is not None:
                stop = min(stop, run.num_fused + limit - (len(self._scored) - before))
            while run.num_fused < stop:
                size = 1 if recipe.apart else _BLOCK
                block = run.places[run.num_fused : min(run.num_fused + size, stop)]
                self._scored |= self._fuse(recipe, tracks[recipe.main].prompt_ids, block)
                run.num_fused += len(block)
        self.num_ready = sum(run.num_ready - run.num_fused for run in self._runs)
        self._drop_used()
        return len(self._scored) - before

    def finish(self, recipe: Recipe, tracks: dict[str, Track], text: str) -> int:
        """Fuse all remaining positions; returns how many. All answers must have arrived. text: for offsets."""
        num_fused = self.advance(recipe, tracks)
        self.described = tuple(_described(tracks[recipe.main], self._scored, text))
        self.reset()
        return num_fused

    def lose(self, members: Collection[str]) -> None:
        """Go on without some assistants. Positions already fused stay as they are."""
        for member in members:
            self._answers.pop(member, None)
        self._runs = ()

    def reset(self) -> None:
        """Drop all answers, since the prompt is computed again or is fully scored."""
        self._answers, self._runs, self._scored, self.num_ready = {}, (), {}, 0

    def _places(self, recipe: Recipe, tracks: dict[str, Track]) -> tuple[_Run, _Run]:
        """The runs of places that are not fused yet: shared, and main alone.

        After a loss more places may be shared, but their answers may have been dropped; there main decides alone.
        """
        shared, alone, main = [], [], recipe.main
        firsts = {member: answers.first for member, answers in self._answers.items()}
        for place in chain(*_runs(recipe, tracks)):
            if place[main] in self._scored:
                continue
            if len(place) > 1 and all(row >= firsts.get(member, 0) for member, row in place.items()):
                shared.append(place)
            else:
                alone.append({main: place[main]})
        return _Run(shared), _Run(sorted(alone, key=lambda place: place[main]))

    def _drop_used(self) -> None:
        heads = [run.places[run.num_fused] for run in self._runs if run.num_fused < len(run.places)]
        for member, answers in self._answers.items():
            answers.drop(min((head[member] for head in heads if member in head), default=answers.end))

    def _fuse(self, recipe: Recipe, ids: list[int], block: Sequence[dict[str, int]]) -> dict[int, Scored]:
        """Position -> score of the token after it. All places of a block consult the same members."""
        parts = [self._answers[member].rows([place[member] for place in block]) for member in block[0]]
        device = parts[0].tail.device
        parts = [part.to(device) for part in parts]
        fused = single(parts[0])
        if len(parts) > 1:
            assert recipe.fusion is not None
            fused = recipe.fusion.fuse(parts, weights_at([recipe] * len(block), parts))
        positions = [place[recipe.main] for place in block]
        return {
            p: score(fused.token_ids[row], fused.logprobs[row], ids[p + 1], self.num_top, ranks=self.ranks)
            for row, p in enumerate(positions)
        }


def _runs(recipe: Recipe, tracks: dict[str, Track]) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """All of main's positions but the last: those that all members share, and those where main decides alone.

    A position maps member -> row of that member's answers.
    """
    main, *others = recipe.members
    same = len({plain_text(track).removeprefix(b" ") for track in tracks.values()}) == 1
    pairs = {member: _paired(tracks[main], tracks[member]) for member in others} if same else {}
    shared, alone = [], []
    for row in range(len(tracks[main].prompt_ids) - 1):
        if pairs and all(row in rows for rows in pairs.values()):
            shared.append({main: row} | {member: rows[row] for member, rows in pairs.items()})
        else:
            alone.append({main: row})
    return shared, alone


def _paired(main: Track, other: Track) -> dict[int, int]:
    """Main's row -> another member's row at the same place that predicts the same thing.

    Control tokens add nothing to the text, so several rows can be at one place. The last of them predicts the text
    that follows. Each earlier row predicts a control token, and is paired, in order, with a row of the other member
    that predicts the same control token. Cost: P log P for P tokens.
    """
    theirs = _by_place(other)
    pairs: dict[int, int] = {}
    for rest, rows in _by_place(main).items():
        if partners := theirs.get(rest):
            pairs |= _paired_controls(main, rows[:-1], other, partners[:-1])
            pairs[rows[-1]] = partners[-1]
    return pairs


def _paired_controls(main: Track, rows: list[int], other: Track, partners: list[int]) -> dict[int, int]:
    """`_paired` for rows at one place that predict a control token."""
    predicting: dict[bytes, list[int]] = {}
    for partner in partners:
        predicting.setdefault(_control(other, partner + 1), []).append(partner)
    pairs: dict[int, int] = {}
    last = -1
    for row in rows:
        free = predicting.get(_control(main, row + 1), [])
        if (place := bisect_right(free, last)) < len(free):
            pairs[row] = last = free[place]
    return pairs


def _by_place(track: Track) -> dict[int, list[int]]:
    """Place in the text -> the rows at that place, in order."""
    found: dict[int, list[int]] = {}
    for row, rest in enumerate(rests(track)):
        found.setdefault(rest, []).append(row)
    return found


def _control(track: Track, row: int) -> bytes:
    """The control token in a row of the prompt; all stop tokens count as one."""
    token_id = track.prompt_ids[row]
    return b"" if token_id in track.vocabulary.stop_ids else track.vocabulary.tokens[token_id]


def _described(main: Track, scored: dict[int, Scored], text: str) -> Iterator[TokenLogprob]:
    for row, (token_id, offset) in enumerate(zip(main.prompt_ids, _offsets(main, text), strict=True)):
        if row == 0:
            yield TokenLogprob(token_id, main.vocabulary.tokens[token_id], None, offset)
        else:
            yield describe_token(main, token_id, scored[row - 1], offset)


def _offsets(main: Track, text: str) -> list[int]:
    """Where each prompt token begins in the text, in whole characters.

    A control token counts only if the text spells its name. A space that the tokenizer put before the text does not
    count.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = -1 if plain_text(main).startswith(b" ") and not text.startswith(" ") else 0
    offsets = []
    for token_id in main.prompt_ids:
        offsets.append(max(at, 0))
        name = main.vocabulary.name_of(token_id)
        plain = decoder.decode(main.vocabulary.text_bytes(token_id))
        named = token_id in main.vocabulary.special_ids and text.startswith(name, max(at, 0))
        at += len(name if named else plain)
    return offsets

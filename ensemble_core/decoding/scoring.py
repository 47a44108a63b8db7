"""Teacher-forced fused log-probabilities of a prompt: what the ensemble gives each of its tokens.

While a prompt is prefilled every member answers at every position. When all of it is cached, main's answer at each
position is fused with the assistants' answers at the same place of the text, where every assistant has a token
boundary there (a shared position); elsewhere main speaks alone. Places are counted in bytes of the text without
control tokens, from its end, since some tokenizers put a space in front of it; where the members otherwise do not
spell the same bytes (a control token that one of them reads as text) main speaks alone everywhere.

Knows candidates and recipes; does not know schedules, engines or outputs.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ensemble_core.decoding.reports import score
from ensemble_core.decoding.requests import TokenLogprob
from ensemble_core.decoding.sequence import Recipe, Scored, describe_token
from ensemble_core.fusion.base import single
from ensemble_core.members.base import Candidates
from ensemble_core.text.alignment import Track

_BLOCK = 64  # positions fused at once


@dataclass(slots=True)
class PromptScores:
    """One sequence's prompt, being scored.

    described: empty until `finish`, then an entry for every prompt token, the first without a number.
    """

    num_top: int
    described: tuple[TokenLogprob, ...] = ()
    _answers: dict[str, list[Candidates]] = field(default_factory=dict)

    def add(self, member: str, candidates: Candidates) -> None:
        """A member's answers for the next positions of its prompt."""
        self._answers.setdefault(member, []).append(candidates)

    def finish(self, recipe: Recipe, tracks: dict[str, Track], text: str) -> None:
        """Fuse all positions; the prompts must be cached as a whole. text: what offsets are counted in."""
        answers = {member: _joined(parts) for member, parts in self._answers.items()}
        main = tracks[recipe.main]
        scored: dict[int, Scored] = {}
        for places in _runs(recipe, tracks):
            for block in (places[i : i + _BLOCK] for i in range(0, len(places), _BLOCK)):
                scored |= self._fuse(recipe, answers, main.prompt_ids, block)
        self.described = tuple(_described(main, scored, text))
        self._answers.clear()

    def _fuse(
        self, recipe: Recipe, answers: dict[str, Candidates], ids: list[int], block: Rows[dict[str, int]]
    ) -> dict[int, Scored]:
        """Position -> what the token after it scored; a block consults the same members everywhere."""
        device = answers[recipe.main].tail.device
        parts = [answers[m].rows([place[m] for place in block]).to(device) for m in block[0]]
        fused = single(parts[0])
        if len(parts) > 1:
            assert recipe.fusion is not None
            fused = recipe.fusion.fuse(parts, torch.tensor([recipe.weights] * len(block), device=device))
        positions = [place[recipe.main] for place in block]
        return {
            p: score(fused.token_ids[row], fused.logprobs[row], ids[p + 1], self.num_top)
            for row, p in enumerate(positions)
        }


def _runs(recipe: Recipe, tracks: dict[str, Track]) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """All of main's positions but the last: those that all members share, and those where main speaks alone.

    A position is member -> row of that member's answers.
    """
    ends = {member: rests(track) for member, track in tracks.items()}
    rows = {member: {rest: row for row, rest in enumerate(places)} for member, places in ends.items()}
    same = len({plain_text(track).removeprefix(b" ") for track in tracks.values()}) == 1
    shared, alone = [], []
    for row, rest in enumerate(ends[recipe.main][:-1]):
        place = {member: rows[member].get(rest, -1) for member in recipe.members[1:]}
        if same and place and min(place.values()) >= 0:
            shared.append({recipe.main: row} | place)
        else:
            alone.append({recipe.main: row})
    return shared, alone


def rests(track: Track) -> list[int]:
    """How much of the text follows each prompt token, in bytes without control tokens: its place in the text."""
    ends = list(accumulate(len(track.vocabulary.text_bytes(token_id)) for token_id in track.prompt_ids))
    return [ends[-1] - end for end in ends]


def plain_text(track: Track) -> bytes:
    """What a prompt's tokens spell, without control tokens."""
    return b"".join(track.vocabulary.text_bytes(token_id) for token_id in track.prompt_ids)


def _joined(parts: list[Candidates]) -> Candidates:
    return Candidates(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail for part in parts]),
    )


def _described(main: Track, scored: dict[int, Scored], text: str) -> Iterator[TokenLogprob]:
    for row, (token_id, offset) in enumerate(zip(main.prompt_ids, _offsets(main, text), strict=True)):
        if row == 0:
            yield TokenLogprob(token_id, main.vocabulary.name_of(token_id), None, offset)
        else:
            yield describe_token(main, token_id, scored[row - 1], offset)


def _offsets(main: Track, text: str) -> list[int]:
    """Where each prompt token begins in the text, in whole characters.

    A control token counts where the text spells its name; a space that the tokenizer put in front does not.
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

"""What the ensemble chooses at places of drafts, those of a kind at once.

A place where assistants agree with main's greedy token is decided without a fusion. Knows candidates and fusions;
does not know how drafts come about, or what becomes of them.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ensemble_core.decoding.acceptance import accept
from ensemble_core.decoding.modes.base import Turn
from ensemble_core.decoding.modes.lockstep import fusion_stats
from ensemble_core.decoding.modes.places import Note, note_of
from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Drafted
from ensemble_core.decoding.shaping import shape
from ensemble_core.decoding.weights import weights_at
from ensemble_core.fusion.base import Fused, single
from ensemble_core.fusion.sharpening import sharpened
from ensemble_core.members.base import Candidates, stacked
from ensemble_core.stats import FusionStats

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PlaceReport:
    """What was fused at a place: what members said, main first, and their weights; what came of it, in which row."""

    parts: list[Candidates]
    weights: tuple[float, ...]
    fused: Fused
    row: int


@dataclass(frozen=True, slots=True)
class Place:
    """A drafted token that can be judged. rows: assistant -> its candidates there."""

    turn: Turn
    number: int
    drafted: Drafted
    rows: Mapping[str, Candidates]

    @property
    def key(self) -> Key:
        """The sequence, and how many tokens that are not final lie before the place."""
        return self.turn.sequence.seq_id, self.number

    @property
    def token_id(self) -> int:
        """The drafted token."""
        return self.drafted.token_id

    @property
    def note(self) -> Note:
        """What was kept of it."""
        return note_of(self.drafted)

    @property
    def text(self) -> bytes:
        """What the drafted token spells."""
        return self.turn.sequence.main.vocabulary.text_bytes(self.token_id)

    def following(self, member: str) -> int:
        """An assistant's own token behind the place; -1: none."""
        spot = (self.note.spots or {})[member]
        return -1 if spot.following is None else spot.following

    def weight(self, member: str) -> float:
        """An assistant's weight in the fusion."""
        recipe = self.turn.recipe
        return recipe.weights[recipe.members.index(member)]


@dataclass(slots=True)
class Judged:
    """What the ensemble chose at judged places; -1: the numbers were not finite.

    said: what assistants said there, of traced requests.
    """

    tokens: dict[Key, int] = field(default_factory=dict)
    said: dict[Key, Mapping[str, Candidates]] = field(default_factory=dict)
    reports: dict[Key, PlaceReport] = field(default_factory=dict)
    fusions: list[FusionStats] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rule:
    """How places are judged.

    consensus: greedy tokens with which the assistants agree anyway are not fused. rejection: sampled tokens are kept
    or rejected (`acceptance.py`); else both distributions are drawn from with one number. sharpen: see `sharpening`.
    """

    consensus: bool = True
    rejection: bool = True
    sharpen: bool = False


def judge(places: abc.Sequence[Place], num_candidates: int, rule: Rule) -> Judged:
    """Decide all places."""
    judged = Judged()
    groups: dict[tuple[object, ...], list[Place]] = {}
    agreed = _agreed([place for place in places if rule.consensus and _may_agree(place)])
    judged.said = {place.key: place.rows for place in places if place.turn.sequence.request.trace}
    for place in places:
        if place.key in agreed:
            judged.tokens[place.key] = place.token_id
        else:
            groups.setdefault(_kind(place), []).append(place)
    for group in groups.values():
        _fuse(group, num_candidates, rule, judged)
    return judged


def is_whole(turn: Turn) -> bool:
    """Whether the fusion needs whole vocabularies."""
    fusion = turn.sequence.recipe.fusion
    return fusion is not None and fusion.full_vocabulary


def row_of(part: Candidates, row: int) -> Candidates:
    """One row of some candidates."""
    return Candidates(part.token_ids[row : row + 1], part.logprobs[row : row + 1], part.tail[row : row + 1])


def is_plain(turn: Turn) -> bool:
    """Whether the fusion's likeliest token is all that matters: nothing shapes it, and nobody asks for numbers."""
    request = turn.sequence.request
    shaped = request.params.shapes_logits or turn.sequence.is_bound
    return request.params.greedy and not request.params.reports_tokens and not shaped


def _may_agree(place: Place) -> bool:
    """Whether the consent of all assistants would decide a place."""
    return is_plain(place.turn) and not place.turn.recipe.apart and bool(place.text)


def _agreed(places: abc.Sequence[Place]) -> set[Key]:
    """Places where each assistant has main's greedy token on top, or their mean probability of it is over 1/2.

    With a gate each one's has to be, since the weights of the mean are not known before. Then no weighted sum of
    distributions has another token on top.
    """
    parts: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        for member, row in place.rows.items():
            parts.setdefault((member, row.token_ids.shape[1]), []).append(place)
    views: dict[Key, list[tuple[float, bool, float]]] = {}  # weight, whether it is on top, probability
    for (member, _), group in parts.items():
        rows = stacked([place.rows[member] for place in group])
        own = [place.following(member) for place in group]
        tops = greedy(rows.token_ids, rows.logprobs).tolist()
        chances = probabilities(rows, torch.tensor(own, device=rows.token_ids.device))
        for place, top, token_id, chance in zip(group, tops, own, chances, strict=True):
            spell = place.turn.sequence.tracks[member].vocabulary.text_bytes
            view = place.weight(member), top == token_id or spell(top) == place.text, chance
            views.setdefault(place.key, []).append(view)
    gated = {place.key for place in places if place.turn.recipe.gate is not None}
    return {
        key
        for key, said in views.items()
        if all(top for _, top, _ in said) or (_least(said) if key in gated else _mean(said)) > 0.5
    }


def _least(said: list[tuple[float, bool, float]]) -> float:
    """The assistants' least probability of the token: no mean is lower, whatever a gate makes of the weights."""
    return min((chance for _, _, chance in said), default=0.0)


def _mean(said: list[tuple[float, bool, float]]) -> float:
    """The assistants' mean probability of the token."""
    total = sum(weight for weight, _, _ in said)
    return sum(weight * chance for weight, _, chance in said) / total if total > 0 else 0.0


def probabilities(rows: Candidates, tokens: Tensor) -> list[float]:
    """Each row's probability of one id, 0 where it is not among the candidates."""
    found = rows.logprobs.masked_fill(rows.token_ids != tokens.unsqueeze(1), -torch.inf)
    return found.amax(dim=1).exp().tolist()


def _kind(place: Place) -> tuple[object, ...]:
    """Places of one kind are fused in one batch."""
    recipe = place.turn.recipe
    alone = (place.turn.sequence.seq_id, place.number) if recipe.apart else None
    fusion = recipe.fusion_key or id(recipe.fusion)
    greedily = place.turn.sequence.request.params.greedy
    widths = tuple((member, row.token_ids.shape[1]) for member, row in place.rows.items())
    return (
        recipe.model,
        recipe.members,
        fusion,
        id(recipe.gate),
        widths,
        place.note.main.token_ids.shape[1],
        greedily,
        alone,
    )


def _fuse(group: abc.Sequence[Place], num_candidates: int, rule: Rule, judged: Judged) -> None:
    """Fuse and sample at places of one kind."""
    started = time.perf_counter()
    main = stacked([place.note.main for place in group])
    others = {member: stacked([place.rows[member] for place in group]) for member in group[0].rows}
    if not is_whole(group[0].turn):
        others = {member: part.best(num_candidates) for member, part in others.items()}
    parts = [main, *(part.to(main.token_ids.device) for part in others.values())]
    turns = [place.turn for place in group]
    fusion = turns[0].recipe.fusion
    assert fusion is not None
    weights = weights_at([turn.recipe for turn in turns], parts)
    fused = fusion.fuse(parts, weights)
    if rule.sharpen:
        fused = sharpened(fused, turns[0].sequence.main.vocabulary.text_bytes)
    seconds = time.perf_counter() - started
    tokens = _tokens(group, fused, main, rule)
    for i, (place, token, row) in enumerate(zip(group, tokens, weights.tolist(), strict=True)):
        judged.tokens[place.key] = token
        judged.reports[place.key] = PlaceReport(parts, tuple(row), fused, i)
    members = [turns[0].recipe.main, *others]
    judged.fusions.append(fusion_stats(turns[0], members, parts, fused, tokens, seconds))


def _tokens(group: abc.Sequence[Place], fused: Fused, main: Candidates, rule: Rule) -> list[int]:
    """The fusion's token at each place. main: what main said there."""
    sequences, masks = [place.turn.sequence for place in group], [place.turn.mask for place in group]
    shaped, ahead = shape(fused, sequences, masks), [place.number for place in group]
    if rule.rejection and not sequences[0].request.params.greedy:
        return accept(shape(single(main), sequences, masks), shaped, sequences, ahead)
    return sample(shaped, sequences, ahead)

"""The lockstep mode: every member answers at every position, and the answers are fused into one token.

Turns with the same fusion are fused in one batch. While a sequence's last character is incomplete, main decides
alone. If an assistant's numbers are not finite, the recipe says what happens: the turn fails, or it is fused again
without that assistant, together with turns that have the same remaining members.

Invariant: a turn's token is the one that it would get alone. Does not know scheduling, caches or text.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble_core.decoding import reports
from ensemble_core.decoding.modes.base import Ask, Decision, Outcome, Turn, joined
from ensemble_core.decoding.rhythm import Beat
from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Choice, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.decoding.weights import weights_at
from ensemble_core.fusion.base import Fused, Fusion, single
from ensemble_core.members.base import Answers, Candidates
from ensemble_core.members.candidates import in_order, narrow
from ensemble_core.members.ranking import ranked
from ensemble_core.stats import FusionStats


@dataclass(frozen=True)
class Lockstep:
    """See the module's docstring."""

    def prospect(self, sequence: Sequence) -> None:
        """Nothing is drafted."""

    def drafter(self, sequence: Sequence) -> str:
        """Main, though nothing is drafted."""
        return sequence.recipe.main

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> dict[str, Ask]:  # noqa: B008, it is frozen
        """Feed each member its uncached tokens; only main while the last character is incomplete."""
        members = sequence.recipe.members
        asked = members[:1] if sequence.mid_character else members
        return {member: Ask(sequence.tracks[member].num_uncached) for member in asked}

    @torch.inference_mode()
    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`. Each turn gets one final token."""
        parts: list[Outcome] = []
        groups = _groups(turns, answers, num_candidates)
        while groups:
            again, part = _decide(groups.pop(0), answers, num_candidates)
            groups += _groups(again, answers, num_candidates)
            parts.append(part)
        return joined(parts)


def _decide(
    group: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int
) -> tuple[list[Turn], Outcome]:
    """Fuse and sample a group; returns the turns to fuse again with fewer members, and the outcome of the others."""
    started = time.perf_counter()
    candidates = _gather(group, answers, num_candidates)
    fused, weights = _fuse(group, candidates)
    if any(unsound := _unsound(group, candidates)):
        again, lost = _without(group, unsound)
        return again, Outcome(lost)
    fused_at = time.perf_counter()
    sequences = [turn.sequence for turn in group]
    tokens = sample(shape(fused, sequences, [turn.mask for turn in group]), sequences)
    decisions = _decisions(group, answers, candidates, weights, fused, tokens)
    sampling = time.perf_counter() - fused_at
    stats = fusion_stats(group[0], list(group[0].feeds), candidates, fused, tokens, fused_at - started)
    return [], Outcome(decisions, [stats], sampling)


def _groups(turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> list[list[Turn]]:
    """Group turns that have the same model, consulted members, fusion, gate, widths of answers and candidates."""
    groups: dict[tuple[object, ...], list[Turn]] = {}
    for turn in turns:
        recipe = turn.recipe
        alone = turn.sequence.seq_id if recipe.apart else None
        fusion = recipe.fusion_key or id(recipe.fusion)
        blocks = tuple((member, answers[member].spans[feed].block) for member, feed in turn.feeds.items())
        key = (recipe.model, blocks, fusion, id(recipe.gate), width_of(turn, num_candidates), alone)
        groups.setdefault(key, []).append(turn)
    return list(groups.values())


def width_of(turn: Turn, num_candidates: int) -> int:
    """Number of main's candidates in the fusion: K, plus room for pinned, banned and constrained ids."""
    constrained = 0 if turn.mask is None else num_candidates // 2
    return num_candidates + turn.sequence.num_extra + constrained


def _gather(group: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> list[Candidates]:
    """Each consulted member's rows for the group, main first, on main's device."""
    parts = [answers[member].last([turn.feeds[member] for turn in group]) for member in group[0].feeds]
    device, fusion = parts[0].token_ids.device, _fusion(group)
    if fusion is None or not fusion.full_vocabulary:
        main, *others = parts
        parts = [narrow_main(group, main, num_candidates), *(part.best(num_candidates) for part in others)]
    return [part.to(device) for part in parts]


def narrow_main(group: abc.Sequence[Turn], wide: Candidates, num_candidates: int) -> Candidates:
    """Main's likeliest ids, the pinned ids, and the likeliest ids that a constraint allows.

    Where something is constrained, `wide` holds whole vocabularies, so ids are places. One search for the likeliest
    serves all rows; most constraints allow enough of them, or hardly any others.
    """
    width = width_of(group[0], num_candidates)
    if all(turn.mask is None for turn in group) or wide.token_ids.shape[1] <= width:
        return narrow(wide, width, [turn.sequence.pinned for turn in group])
    places = wide.first(width)
    for row, turn in enumerate(group):
        kept, top = set(turn.sequence.pinned), places[row]
        if turn.mask is not None:
            kept.update(_allowed(wide, row, top, turn.mask, num_candidates // 2))
        ids = top.tolist()
        if missing := kept.difference(ids):
            places[row] = torch.tensor(_with(ids, kept, missing))
    return in_order(wide.at(places))


def _allowed(wide: Candidates, row: int, top: Tensor, mask: Tensor, num: int) -> list[int]:
    """The `num` likeliest ids (or all) of a row that a constraint allows. top: the row's likeliest ids, in order."""
    found: list[int] = top[mask.to(top.device)[top]].tolist()
    if len(found) >= num:
        return found[:num]
    ids = torch.from_numpy(np.flatnonzero(mask.numpy())).to(top.device)  # five times as fast as torch's own
    return list(ids[ranked(wide.numbers(row, ids), min(num, len(ids)), ids)].tolist())


def _with(ids: list[int], kept: set[int], missing: set[int]) -> list[int]:
    """The ids with those of `kept` that are missing in place of the last others."""
    spare = [place for place, token_id in enumerate(ids) if token_id not in kept][-len(missing) :]
    for place, token_id in zip(spare, sorted(missing), strict=True):
        ids[place] = token_id
    return ids


def _fuse(group: abc.Sequence[Turn], candidates: list[Candidates]) -> tuple[Fused, Tensor]:
    """What the group's fusion makes of candidates, and the weights (B, M) with which."""
    fusion = _fusion(group)
    if fusion is None:
        return single(candidates[0]), torch.ones(len(group), 1)
    weights = weights_at([turn.recipe for turn in group], candidates)
    return fusion.fuse(candidates, weights), weights


def _unsound(group: abc.Sequence[Turn], candidates: abc.Sequence[Candidates]) -> list[tuple[str, ...]]:
    """For each turn, the members whose numbers are not finite."""
    peaks = torch.stack([part.logprobs.amax(dim=1) for part in candidates], dim=1)  # (B, M)
    members = list(group[0].feeds)
    return [
        tuple(member for member, fine in zip(members, row, strict=True) if not fine)
        for row in peaks.isfinite().tolist()
    ]


def _without(
    group: abc.Sequence[Turn], unsound: abc.Sequence[tuple[str, ...]]
) -> tuple[list[Turn], list[Decision]]:
    """The turns to fuse again, each without its unsound members, and the decisions of those that fail."""
    again, lost = [], []
    for turn, members in zip(group, unsound, strict=True):
        if all(turn.recipe.can_lose(member) for member in members):
            again.append(turn.without(members, "non_finite") if members else turn)
        else:
            lost.append(failed(turn, members))
    return again, lost


def failed(turn: Turn, unsound: tuple[str, ...]) -> Decision:
    """The decision for a turn whose numbers are not finite. unsound: the members that it lost for that."""
    members = turn.sequence.recipe.members
    return Decision(
        turn.sequence, unsound=unsound, error=f"the fusion of {members} gave numbers that are not finite"
    )


def _fusion(group: abc.Sequence[Turn]) -> Fusion | None:
    """The group's fusion; None if main decides alone."""
    return group[0].recipe.fusion if len(group[0].feeds) > 1 else None


def _decisions(
    group: abc.Sequence[Turn],
    answers: Mapping[str, Answers],
    candidates: list[Candidates],
    weights: Tensor,
    fused: Fused,
    tokens: abc.Sequence[int],
) -> list[Decision]:
    """A decision for each token, with the reports that its request asked for."""
    decisions = []
    main = group[0].recipe.main
    for i, (turn, token) in enumerate(zip(group, tokens, strict=True)):
        unsound = turn.non_finite
        if token < 0:
            decisions.append(failed(turn, unsound))
            continue
        request, trace = turn.sequence.request, None
        span = answers[main].spans[turn.feeds[main]]
        wide = answers[main].blocks[span.block]
        named = reports.named(request.params, wide, span.stop - 1, candidates[0].tail[i])
        scored = reports.scored(request.params, fused, i, token, named)
        if request.trace:
            left_out = {**turn.sequence.dropped, **turn.left_out}
            said = dict(zip(turn.feeds, candidates, strict=True))
            recipe, tracks = turn.sequence.recipe, turn.sequence.tracks
            trace = reports.trace(recipe, tracks, said, fused, i, token, left_out, weights=weights[i].tolist())
        consulted = int(len(turn.feeds) > 1)
        decisions.append(
            Decision(turn.sequence, (Choice(token, scored, trace),), unsound=unsound, consulted=consulted)
        )
    return decisions


def fusion_stats(
    turn: Turn,
    members: abc.Sequence[str],
    candidates: abc.Sequence[Candidates],
    fused: Fused,
    tokens: abc.Sequence[int],
    seconds: float,
) -> FusionStats:
    """The metrics of rows that were fused together, `turn` one of them. Rows without a token are not counted."""
    recipe, tracks = turn.recipe, turn.sequence.tracks
    sound = [i for i, token in enumerate(tokens) if token >= 0]
    chosen = {i: tracks[recipe.main].vocabulary.text_bytes(tokens[i]) for i in sound}
    agreed = {}
    for member, part in zip(members[1:], candidates[1:], strict=True):
        spell, top = tracks[member].vocabulary.text_bytes, _top(part)
        hits = sum(spell(top[i]) == chosen[i] for i in sound)
        agreed[member] = (hits, len(sound) - hits)
    top = _top(candidates[0])
    overruled = sum(top[i] != tokens[i] for i in sound) if agreed else 0
    unmapped = dict(zip(members, fused.unmapped[sound].t().tolist(), strict=True))
    name = recipe.fusion_name if agreed else "single"
    return FusionStats(recipe.model, name, seconds, unmapped, agreed, overruled)


def _top(candidates: Candidates) -> list[int]:
    """Each row's likeliest id."""
    return greedy(candidates.token_ids, candidates.logprobs).tolist()

"""The lockstep way to take a step: every member answers at every position, and the answers are fused.

Turns the members' answers into one token a sequence. Groups the rows that are fused alike, so that each group is
one batched call. While a sequence's last character is incomplete main decides alone. Does not know scheduling,
caches or text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused, Fusion, single
from ensemble_core.members.base import Candidates
from ensemble_core.stats import FusionStats


@dataclass(frozen=True, slots=True)
class Row:
    """One deciding sequence, and where each consulted member's answer for it is: member -> row of candidates."""

    sequence: Sequence
    places: dict[str, int]


@dataclass(frozen=True, slots=True)
class Decision:
    """The token of one sequence; -1: its members' numbers were not finite."""

    sequence: Sequence
    token_id: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One step's decisions, and what they cost."""

    decisions: list[Decision]
    fusions: list[FusionStats]
    sampling_seconds: float


def decide(rows: Rows[Row], answers: Mapping[str, Candidates], num_candidates: int) -> Outcome:
    """Fuse and sample every row.

    answers: member -> candidates, on the member's device. num_candidates: K of a closed support; a member that was
    asked for more (another row's fusion works on whole vocabularies) is cut to it.
    """
    decisions: list[Decision] = []
    fusions: list[FusionStats] = []
    sampling = 0.0
    for group in _groups(rows):
        started = time.perf_counter()
        candidates = _gather(group, answers, num_candidates)
        fused = _fuse(group, candidates)
        fused_at = time.perf_counter()
        drawn = sample(fused, [row.sequence for row in group])
        tokens = [t if sound else -1 for t, sound in zip(drawn, _sound(candidates), strict=True)]
        sampling += time.perf_counter() - fused_at
        decisions += [Decision(row.sequence, token) for row, token in zip(group, tokens, strict=True)]
        fusions.append(_stats(group, candidates, fused, tokens, fused_at - started))
    return Outcome(decisions, fusions, sampling)


def _groups(rows: Rows[Row]) -> list[list[Row]]:
    """Rows of one model whose consulted members are the same and fused by the same fusion."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        recipe = row.sequence.recipe
        groups.setdefault((recipe.model, tuple(row.places), id(recipe.fusion)), []).append(row)
    return list(groups.values())


def _gather(group: Rows[Row], answers: Mapping[str, Candidates], num_candidates: int) -> list[Candidates]:
    """Each consulted member's rows for the group, main first, on main's device."""
    fusion = _fusion(group)
    main = next(iter(group[0].places))
    device = answers[main].token_ids.device
    parts = [answers[member].rows([row.places[member] for row in group]) for member in group[0].places]
    if fusion is None or not fusion.full_vocabulary:
        parts = [part.best(num_candidates) for part in parts]
    return [part.to(device) for part in parts]


def _fuse(group: Rows[Row], candidates: list[Candidates]) -> Fused:
    fusion = _fusion(group)
    if fusion is None:
        return single(candidates[0])
    weights = torch.tensor([row.sequence.recipe.weights for row in group], device=candidates[0].tail.device)
    return fusion.fuse(candidates, weights)


def _sound(candidates: Rows[Candidates]) -> list[bool]:
    """For each row whether every member's numbers are finite."""
    peaks = torch.stack([part.logprobs.amax(dim=1) for part in candidates])  # (M, B)
    return peaks.isfinite().all(dim=0).tolist()


def _fusion(group: Rows[Row]) -> Fusion | None:
    """The group's fusion; None where main decides alone."""
    return group[0].sequence.recipe.fusion if len(group[0].places) > 1 else None


def _stats(
    group: Rows[Row], candidates: list[Candidates], fused: Fused, tokens: list[int], seconds: float
) -> FusionStats:
    """The numbers of a group's sound rows; rows that failed count nowhere."""
    recipe, tracks = group[0].sequence.recipe, group[0].sequence.tracks
    members = list(group[0].places)
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

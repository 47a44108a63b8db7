"""The lockstep way to take a step: every member answers at every position, and the answers are fused.

Turns the members' answers into one token a sequence. Groups the rows that are fused alike, so that each group is
one batched call. While a sequence's last character is incomplete main decides alone. Where an assistant's numbers are
not finite its row is fused without it, with the rows that the same members are left of, or fails, as its recipe says;
the other rows get what they would have got. Does not know scheduling, caches or text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ensemble_core.decoding import reports
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Trace
from ensemble_core.decoding.sampler import greedy, sample
from ensemble_core.decoding.sequence import Scored, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.fusion.base import Fused, Fusion, single
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import narrow
from ensemble_core.members.ranking import ranked
from ensemble_core.stats import FusionStats, Reason


@dataclass(frozen=True, slots=True)
class Row:
    """One deciding sequence, and where each consulted member's answer for it is: member -> row of candidates.

    biased: main's ids that must be in the support. mask: main's ids that its constraint allows, (V,) bool. left_out:
    members of its recipe that do not count in this step, and why.
    """

    sequence: Sequence
    places: dict[str, int]
    biased: tuple[int, ...] = ()
    mask: Tensor | None = None
    left_out: Mapping[str, Reason] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """How this step is fused."""
        return self.sequence.recipe.without(self.left_out)

    def without(self, members: Rows[str], reason: Reason) -> Row:
        """The row with some assistants left out, and those that its fusion cannot use without them."""
        recipe = self.recipe.without(members)
        left_out = dict(self.left_out) | dict.fromkeys(members, reason)
        idle = (m for m in self.sequence.recipe.members if m not in recipe.members and m not in left_out)
        left_out |= dict.fromkeys(idle, "idle")
        places = {member: place for member, place in self.places.items() if member not in left_out}
        return replace(self, places=places, left_out=left_out)

    def width(self, num_candidates: int) -> int:
        """Main's candidates in the fusion: what is asked for beyond the likeliest comes on top of them."""
        constrained = 0 if self.mask is None else num_candidates // 2
        return num_candidates + len(self.biased) + constrained


@dataclass(frozen=True, slots=True)
class Decision:
    """The token of one sequence; -1: there is none. unsound: members whose numbers were not finite."""

    sequence: Sequence
    token_id: int
    unsound: tuple[str, ...] = ()
    scored: Scored | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One step's decisions, and what they cost."""

    decisions: list[Decision]
    fusions: list[FusionStats]
    sampling_seconds: float


def decide(rows: Rows[Row], answers: Mapping[str, Candidates], num_candidates: int) -> Outcome:
    """Fuse and sample every row.

    answers: member -> candidates, on the member's device. num_candidates: K of a closed support; a member that was
    asked for more (another row needs whole vocabularies) is cut to it.
    """
    decisions: list[Decision] = []
    fusions: list[FusionStats] = []
    sampling = 0.0
    groups = _groups(rows, num_candidates)
    while groups:
        group, started = groups.pop(0), time.perf_counter()
        candidates = _gather(group, answers, num_candidates)
        fused = _fuse(group, candidates)
        if any(unsound := _unsound(group, candidates)):
            again, failed = _without(group, unsound)
            groups += _groups(again, num_candidates)
            decisions += failed
            continue
        fused_at = time.perf_counter()
        sequences = [row.sequence for row in group]
        tokens = sample(shape(fused, sequences, [row.mask for row in group]), sequences)
        decisions += _decisions(group, candidates, fused, tokens)
        sampling += time.perf_counter() - fused_at
        fusions.append(_stats(group, candidates, fused, tokens, fused_at - started))
    return Outcome(decisions, fusions, sampling)


def _groups(rows: Rows[Row], num_candidates: int) -> list[list[Row]]:
    """Rows of one model whose consulted members are the same, fused by the same fusion on as many candidates."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        recipe = row.recipe
        alone = row.sequence.seq_id if recipe.apart else None
        key = (recipe.model, tuple(row.places), id(recipe.fusion), row.width(num_candidates), alone)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _gather(group: Rows[Row], answers: Mapping[str, Candidates], num_candidates: int) -> list[Candidates]:
    """Each consulted member's rows for the group, main first, on main's device."""
    fusion = _fusion(group)
    main, *others = group[0].places
    device = answers[main].token_ids.device
    parts = {member: answers[member].rows([row.places[member] for row in group]) for member in (main, *others)}
    if fusion is None or not fusion.full_vocabulary:
        parts[main] = _narrow_main(group, parts[main], num_candidates)
        parts |= {member: parts[member].best(num_candidates) for member in others}
    return [part.to(device) for part in parts.values()]


def _narrow_main(group: Rows[Row], wide: Candidates, num_candidates: int) -> Candidates:
    """Main's likeliest, those that are biased, and the likeliest that a constraint allows."""
    width = group[0].width(num_candidates)
    keep = []
    for i, row in enumerate(group):
        kept = list(row.biased)
        if row.mask is not None:
            allowed = row.mask.to(wide.token_ids.device)[wide.token_ids[i]]
            reachable = wide.logprobs[i].masked_fill(~allowed, -torch.inf)
            best = ranked(reachable, min(num_candidates // 2, int(allowed.sum())), wide.token_ids[i])
            kept += wide.token_ids[i, best].tolist()
        keep.append(tuple(kept))
    return narrow(wide, width, keep)


def _fuse(group: Rows[Row], candidates: list[Candidates]) -> Fused:
    fusion = _fusion(group)
    if fusion is None:
        return single(candidates[0])
    weights = torch.tensor([row.recipe.weights for row in group], device=candidates[0].tail.device)
    return fusion.fuse(candidates, weights)


def _unsound(group: Rows[Row], candidates: Rows[Candidates]) -> list[tuple[str, ...]]:
    """For each row the members whose numbers are not finite."""
    peaks = torch.stack([part.logprobs.amax(dim=1) for part in candidates], dim=1)  # (B, M)
    members = list(group[0].places)
    return [
        tuple(member for member, fine in zip(members, row, strict=True) if not fine)
        for row in peaks.isfinite().tolist()
    ]


def _without(group: Rows[Row], unsound: Rows[tuple[str, ...]]) -> tuple[list[Row], list[Decision]]:
    """The rows to be fused again, each without its unsound members, and those that fail."""
    again, failed = [], []
    for row, members in zip(group, unsound, strict=True):
        if all(row.recipe.can_lose(member) for member in members):
            again.append(row.without(members, "non_finite") if members else row)
        else:
            failed.append(Decision(row.sequence, -1, members))
    return again, failed


def _fusion(group: Rows[Row]) -> Fusion | None:
    """The group's fusion; None where main decides alone."""
    return group[0].recipe.fusion if len(group[0].places) > 1 else None


def _decisions(group: Rows[Row], candidates: list[Candidates], fused: Fused, tokens: Rows[int]) -> list[Decision]:
    """The tokens, with the reports that their requests asked for."""
    decisions = []
    for i, (row, token) in enumerate(zip(group, tokens, strict=True)):
        request, scored, trace = row.sequence.request, None, None
        if token >= 0 and request.params.logprobs is not None:
            scored = reports.score(fused.token_ids[i], fused.logprobs[i], token, request.params.logprobs)
        if token >= 0 and request.trace:
            left_out = {**row.sequence.dropped, **row.left_out}
            trace = reports.trace(row.sequence, list(row.places), candidates, fused, i, token, left_out)
        unsound = tuple(member for member, reason in row.left_out.items() if reason == "non_finite")
        decisions.append(Decision(row.sequence, token, unsound, scored, trace))
    return decisions


def _stats(
    group: Rows[Row], candidates: list[Candidates], fused: Fused, tokens: list[int], seconds: float
) -> FusionStats:
    """The numbers of a group's rows; those without a token count nowhere."""
    recipe, tracks = group[0].recipe, group[0].sequence.tracks
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

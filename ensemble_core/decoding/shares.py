"""One sequence's part of a step: how much of its text each member is fed, chunks of prompts among it. No torch.

Knows sequences, modes' plans and a budget of tokens; does not know pages, or who runs.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble_core.decoding.modes.base import Ask, mode_of
from ensemble_core.decoding.pace import LEAST, SCORING, WorkKind
from ensemble_core.decoding.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: how many tokens to feed each member, and whether the answers decide tokens.

    wanted: member -> number of last positions to answer, if the share decides. scores: number of positions of a
    scored prompt that may be fused. drafter: the member whose tokens count as drafted, if others depend on the beat.
    """

    sequence: Sequence
    counts: dict[str, int]
    decides: bool
    prefill: bool  # the tokens are part of the prompt
    wanted: Mapping[str, int] = field(default_factory=dict)
    scores: int = 0
    drafter: str = ""


def untouched(sequence: Sequence) -> bool:
    """Whether nothing of a prompt has been read, or found in a cache."""
    return sequence.phase is Phase.PREFILL and not any(t.num_cached for t in sequence.tracks.values())


def deciding_share(sequence: Sequence, plan: Mapping[str, Ask], prefill: bool) -> Share:
    """The share that a mode plans."""
    counts = {member: ask.count for member, ask in plan.items()}
    wanted = {member: ask.wanted for member, ask in plan.items()}
    return Share(sequence, counts, decides=True, prefill=prefill, wanted=wanted)


def kinds(prompts: abc.Sequence[Sequence]) -> set[WorkKind]:
    """The kinds of work in prefilling these prompts: members with more than one token to go, and scoring."""
    scoring = any(s.scoring for s in prompts)
    answering = scoring or any(s.weighing for s in prompts)
    kinds = {(member, answering) for s in prompts for member, track in s.tracks.items() if track.num_uncached > 1}
    return kinds | {SCORING} if scoring else kinds


def prefill_shares(prompts: abc.Sequence[Sequence], left: dict[str, int], positions: float) -> list[Share]:
    """Chunks of prompts, in order. A prompt begins once the budget of all its members reaches it.

    left: member -> tokens left in the budget, spent here. positions: how many may be fused.
    """
    shares = []
    for sequence in prompts:
        if untouched(sequence) and not all(left[member] for member in sequence.tracks):
            continue  # it has not begun, see `beginners`
        share = _prefill_share(sequence, left, positions)
        if share.counts or share.scores:
            spend(left, share.counts)
            positions -= share.scores
            shares.append(share)
    return shares


def _prefill_share(sequence: Sequence, left: Mapping[str, int], positions: float) -> Share:
    """The deciding step that the mode plans, if it fits; else a chunk that leaves each member its last token.

    A member that the plan leaves out is first fed all but its last token. A scored prompt with a constrained answer
    decides in a step with only its last token, since only that position needs main's whole vocabulary.
    """
    rest = {member: track.num_uncached for member, track in sequence.tracks.items()}
    plan = mode_of(sequence.recipe.mode).plan(sequence)
    apart = sequence.scoring and sequence.constraint is not None
    ready = sequence.scores.num_ready if sequence.scores is not None and sequence.scoring else 0
    fits = all(count <= (left[m] if m in plan and not apart else 1) for m, count in rest.items())
    if fits and ready + sequence.scoring * rest[sequence.recipe.main] <= max(positions, LEAST):
        return deciding_share(sequence, plan, prefill=True)
    chunks = {member: min(count - 1, left[member]) for member, count in rest.items()}
    counts = {member: count for member, count in chunks.items() if count > 0}
    if not sequence.scoring:
        return Share(sequence, counts, decides=False, prefill=True)
    scores = int(min(ready + counts.get(sequence.recipe.main, 0), max(positions, 0)))
    return Share(sequence, counts, decides=False, prefill=True, scores=scores)


def spend(left: dict[str, int], counts: Mapping[str, int]) -> None:
    """Take what a share feeds out of the members' budgets."""
    for member, count in counts.items():
        left[member] = max(0, left[member] - count)

"""Who runs in the next step, and with how many tokens. No torch.

A sequence is admitted in all its members at once, first come, first served, and holds the pages that its tokens need
now. It grows page by page; where a member runs out, the youngest sequence there is preempted: it goes back to the
head of the queue and is computed anew later, text and all. Newcomers leave everybody who runs a page to grow into.
Decoding sequences go first in every step; what is left of the token budget is prefilled in chunks, beside running
streams no more than `Pace` grants. The last piece of a prompt is fed to all members in one step, which is the first
step that decides a token; a scored prompt waits with it until its scores are nearly done. Sequences of one group have
the same prompt: one of them leads, the others wait until its prompt is cached and take it over.

Invariants: a step never feeds more than a member's pages hold; every admitted sequence is on `running` until it is
preempted or retired; nobody overtakes the head of the queue; the oldest sequence is never preempted, so all come to
their end. Does not know tensors, forwards or fusion.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ensemble_core.decoding.pace import LEAST, SCORING, Kind, Pace
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.errors import QueueFullError

if TYPE_CHECKING:
    from ensemble_core.decoding.modes.base import Ask


@dataclass(frozen=True, slots=True)
class Capacity:
    """A member's cache as the scheduler sees it."""

    page_size: int  # tokens
    num_pages: int
    max_len: int  # tokens a sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: tokens to feed per member, and whether the answers decide anything.

    wanted: member -> how many of its last tokens must be answered, where the share decides. scores: positions of a
    scored prompt that may be fused.
    """

    sequence: Sequence
    counts: dict[str, int]
    decides: bool
    prefill: bool  # the tokens are a part of the prompt
    wanted: Mapping[str, int] = field(default_factory=dict)
    scores: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the whole engine."""

    max_running: int
    max_waiting: int
    token_budget: int  # tokens a member is fed in one step
    max_stretch: float = math.inf  # a step with prefill over one without, while streams run


class Scheduler:
    """Waiting and running sequences, and the pages that they have reserved."""

    def __init__(self, capacities: Mapping[str, Capacity], limits: Limits) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._capacities = dict(capacities)
        self._limits = limits
        self.pace = Pace(limits.max_stretch)
        for name, capacity in capacities.items():
            assert capacity.page_size * capacity.num_pages >= capacity.max_len, f"{name}: too few pages for one"

    @property
    def has_work(self) -> bool:
        """True while somebody runs or waits."""
        return bool(self.running or self.waiting)

    def reserved(self, member: str) -> int:
        """Pages of a member that running sequences need for the tokens that they have now."""
        return sum(self._pages(s, member) for s in self.running if member in s.tracks)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFullError."""
        room = self._limits.max_waiting - len(self.waiting)
        if len(sequences) > room:
            raise QueueFullError(
                f"the queue has room for {max(room, 0)} of {self._limits.max_waiting} waiting sequences, this "
                f"request needs {len(sequences)}; try again later, or raise scheduler.max_waiting"
            )
        self.waiting.extend(sequences)

    def schedule(self) -> list[Share]:
        """The shares of the next step, after `admit`: decode, then prefill what the budget allows."""
        left = dict.fromkeys(self._capacities, self._limits.token_budget)
        shares = [_decode_share(s) for s in self.running if s.phase is Phase.DECODE]
        for share in shares:
            _spend(left, share.counts)
        prompts = [s for s in self.running if s.phase is Phase.PREFILL and not self._awaits_leader(s)]
        granted = self.pace.grant(_kinds(prompts), len(shares), len(prompts))
        if granted == 0:
            return shares
        most = self._limits.token_budget if granted is None else granted
        left = {member: max(min(tokens, most), 1) for member, tokens in left.items()}  # prompts go on
        return shares + _prefill_shares(prompts, left, math.inf if granted is None else granted)

    def beginners(self) -> list[tuple[Sequence, Sequence | None]]:
        """Admitted sequences that nothing is cached of and that need not wait, each with its leader, if any."""
        pairs = [(s, self._leader(s)) for s in self.running if _untouched(s)]
        return [(s, leader) for s, leader in pairs if leader is None or leader.phase is Phase.DECODE]

    def admit(self) -> list[Sequence]:
        """Make room for what runs, then let waiting sequences in, in order.

        Returns those that were preempted, youngest first: the caller gives back their pages in every member.
        """
        preempted = self._make_room()
        while self.waiting and len(self.running) < self._limits.max_running and self._fits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            sequence.phase, sequence.admitted = Phase.PREFILL, sequence.admitted or time.perf_counter()
        return preempted

    def _make_room(self) -> list[Sequence]:
        preempted = []
        for member, capacity in self._capacities.items():
            while self.reserved(member) > capacity.num_pages:
                youngest = next(s for s in reversed(self.running) if member in s.tracks)
                self.running.remove(youngest)
                youngest.preempt()
                preempted.append(youngest)
        # Back to the head of the queue, the oldest first.
        self.waiting.extendleft(sorted(preempted, key=lambda s: s.admitted or 0.0, reverse=True))
        return preempted

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the tokens that it has now fit, and leave everybody who can grow a page to do so."""
        if not self.running:
            return True
        for member in sequence.tracks:
            spare = sum(self._can_grow(s, member) for s in (*self.running, sequence) if member in s.tracks)
            needed = self.reserved(member) + self._pages(sequence, member) + spare
            if needed > self._capacities[member].num_pages:
                return False
        return True

    def retire(self) -> list[Sequence]:
        """Take finished sequences off all lists."""
        finished = [s for s in (*self.running, *self.waiting) if s.phase is Phase.FINISHED]
        if finished:
            self.running = [s for s in self.running if s.phase is not Phase.FINISHED]
            self.waiting = deque(s for s in self.waiting if s.phase is not Phase.FINISHED)
        return finished

    def check(self) -> None:
        """Integrity: what is cached fits, and only of those that run. For tests and debugging."""
        for member, capacity in self._capacities.items():
            cached = [s.tracks[member].num_held for s in self.running if member in s.tracks]
            assert sum(-(-tokens // capacity.page_size) for tokens in cached) <= capacity.num_pages
        assert not any(track.num_cached for s in self.waiting for track in s.tracks.values())

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """The first running sequence with the same prompt, if it is another one and has something to hand over."""
        group = sequence.request.group
        if group is None or all(len(track.prompt_ids) == 1 for track in sequence.tracks.values()):
            return None
        first = next(s for s in self.running if s.request.group == group and s.phase is not Phase.FINISHED)
        return None if first is sequence else first

    def _awaits_leader(self, sequence: Sequence) -> bool:
        return _untouched(sequence) and self._leader(sequence) is not None

    def _pages(self, sequence: Sequence, member: str) -> int:
        """Pages for the tokens that the sequence has now, and for those that the member has not dropped yet."""
        track = sequence.tracks[member]
        return -(-max(len(track), track.num_held) // self._capacities[member].page_size)

    def _can_grow(self, sequence: Sequence, member: str) -> bool:
        """Whether the sequence may come to need more pages than now.

        Main's completion is at most max_tokens; an assistant may need more tokens for the same text, up to its
        own max_len.
        """
        capacity, track = self._capacities[member], sequence.tracks[member]
        longest = capacity.max_len
        if member == sequence.recipe.main:
            longest = min(longest, len(track.prompt_ids) + sequence.request.params.max_tokens)
        return -(-longest // capacity.page_size) > self._pages(sequence, member)


def _untouched(sequence: Sequence) -> bool:
    return sequence.phase is Phase.PREFILL and not any(t.num_cached for t in sequence.tracks.values())


def _decode_share(sequence: Sequence) -> Share:
    return _deciding_share(sequence, _plan(sequence), prefill=False)


def _plan(sequence: Sequence) -> Mapping[str, Ask]:
    assert sequence.recipe.mode is not None, "a recipe that only scores text is not decoded"
    return sequence.recipe.mode.plan(sequence)


def _deciding_share(sequence: Sequence, plan: Mapping[str, Ask], prefill: bool) -> Share:
    counts = {member: ask.count for member, ask in plan.items()}
    wanted = {member: ask.wanted for member, ask in plan.items()}
    return Share(sequence, counts, decides=True, prefill=prefill, wanted=wanted)


def _kinds(prompts: list[Sequence]) -> set[Kind]:
    """What prefilling these prompts will cost: members with more than a last token to go, and scoring."""
    scoring = any(s.scoring for s in prompts)
    answering = scoring or any(s.weighing for s in prompts)
    kinds = {(member, answering) for s in prompts for member, track in s.tracks.items() if track.num_uncached > 1}
    return kinds | {SCORING} if scoring else kinds


def _prefill_shares(prompts: list[Sequence], left: dict[str, int], positions: float) -> list[Share]:
    """Chunks of prompts, in order. left: tokens for each member, spent here; positions: that may be fused."""
    shares = []
    for sequence in prompts:
        share = _prefill_share(sequence, left, positions)
        if share.counts or share.scores:
            _spend(left, share.counts)
            positions -= share.scores
            shares.append(share)
    return shares


def _prefill_share(sequence: Sequence, left: Mapping[str, int], positions: float) -> Share:
    """What the mode plans for the deciding step if that fits, else a chunk that leaves each member its last token.

    A member that the plan leaves out is fed all but its last token first. A scored prompt whose answer is constrained
    decides with its last token alone, since only that position needs main's whole vocabulary.
    """
    rest = {member: track.num_uncached for member, track in sequence.tracks.items()}
    plan = _plan(sequence)
    apart = sequence.scoring and sequence.constraint is not None
    ready = sequence.scores.num_ready if sequence.scores is not None and sequence.scoring else 0
    fits = all(count <= (left[m] if m in plan and not apart else 1) for m, count in rest.items())
    if fits and ready + sequence.scoring * rest[sequence.recipe.main] <= max(positions, LEAST):
        return _deciding_share(sequence, plan, prefill=True)
    chunks = {member: min(count - 1, left[member]) for member, count in rest.items()}
    counts = {member: count for member, count in chunks.items() if count > 0}
    if not sequence.scoring:
        return Share(sequence, counts, decides=False, prefill=True)
    scores = int(min(ready + counts.get(sequence.recipe.main, 0), max(positions, 0)))
    return Share(sequence, counts, decides=False, prefill=True, scores=scores)


def _spend(left: dict[str, int], counts: Mapping[str, int]) -> None:
    for member, count in counts.items():
        left[member] = max(0, left[member] - count)

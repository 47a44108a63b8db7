"""Who runs in the next step, and with how many tokens. No torch.

A sequence is admitted in all its members at once, first come, first served, and reserves every page that it can
ever need: so nothing that runs can run out. Decoding sequences go first in every step; what is left of the token
budget is prefilled in chunks, beside running streams no more than `Pace` grants. The last piece of a prompt is fed
to all members in one step, which is the first step that decides a token; a scored prompt waits with it until its
scores are nearly done. Sequences of one group have the same prompt: one of them leads, the others wait until its
prompt is cached and take it over.

Invariants: reserved pages never exceed a member's; every admitted sequence is on `running` until `retire`; nobody
overtakes the head of the queue. Does not know tensors, forwards or fusion.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_core.decoding.pace import LEAST, SCORING, Kind, Pace
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.errors import QueueFullError


@dataclass(frozen=True, slots=True)
class Capacity:
    """A member's cache as the scheduler sees it."""

    page_size: int  # tokens
    num_pages: int
    max_len: int  # tokens a sequence


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: tokens to feed per member, and whether a token is decided.

    scores: positions of a scored prompt that may be fused.
    """

    sequence: Sequence
    counts: dict[str, int]
    decides: bool
    prefill: bool  # the tokens are a part of the prompt
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
        self._reserved = dict.fromkeys(capacities, 0)

    @property
    def has_work(self) -> bool:
        """True while somebody runs or waits."""
        return bool(self.running or self.waiting)

    def reserved(self, member: str) -> int:
        """Pages of a member that running sequences have reserved."""
        return self._reserved[member]

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
        """The shares of the next step: admit, then decode, then prefill what the budget allows."""
        self.admit()
        left = dict.fromkeys(self._capacities, self._limits.token_budget)
        shares = [_decode_share(s) for s in self.running if s.phase is Phase.DECODE]
        for share in shares:
            _spend(left, share.counts)
        prompts = [s for s in self.running if s.phase is Phase.PREFILL and not self._awaits_leader(s)]
        granted = self.pace.grant(_kinds(prompts), len(shares))
        if granted == 0:
            return shares
        most = self._limits.token_budget if granted is None else granted
        left = {member: max(min(tokens, most), 1) for member, tokens in left.items()}  # prompts go on
        return shares + _prefill_shares(prompts, left, math.inf if granted is None else granted)

    def beginners(self) -> list[tuple[Sequence, Sequence | None]]:
        """Admitted sequences that nothing is cached of and that need not wait, each with its leader, if any."""
        pairs = [(s, self._leader(s)) for s in self.running if _untouched(s)]
        return [(s, leader) for s, leader in pairs if leader is None or leader.phase is Phase.DECODE]

    def admit(self) -> None:
        """Let waiting sequences in, in order, as long as all that they need fits."""
        while self.waiting and len(self.running) < self._limits.max_running:
            sequence = self.waiting[0]
            pages = self._pages(sequence)
            if any(self._reserved[m] + n > self._capacities[m].num_pages for m, n in pages.items()):
                return
            for member, count in pages.items():
                self._reserved[member] += count
            self.running.append(self.waiting.popleft())
            sequence.phase, sequence.admitted = Phase.PREFILL, time.perf_counter()

    def retire(self) -> list[Sequence]:
        """Take finished sequences off all lists and free what they reserved."""
        finished = [s for s in (*self.running, *self.waiting) if s.phase is Phase.FINISHED]
        for sequence in finished:
            if sequence.admitted is not None:
                for member, pages in self._pages(sequence).items():
                    self._reserved[member] -= pages
        if finished:
            self.running = [s for s in self.running if s.phase is not Phase.FINISHED]
            self.waiting = deque(s for s in self.waiting if s.phase is not Phase.FINISHED)
        return finished

    def check(self) -> None:
        """Integrity: what is reserved is what the running sequences need, and it fits."""
        for member, capacity in self._capacities.items():
            needed = sum(self._pages(s).get(member, 0) for s in self.running)
            assert self._reserved[member] == needed <= capacity.num_pages

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """The first running sequence with the same prompt, if it is another one and has something to hand over."""
        group = sequence.request.group
        if group is None or all(len(track.prompt_ids) == 1 for track in sequence.tracks.values()):
            return None
        first = next(s for s in self.running if s.request.group == group and s.phase is not Phase.FINISHED)
        return None if first is sequence else first

    def _awaits_leader(self, sequence: Sequence) -> bool:
        return _untouched(sequence) and self._leader(sequence) is not None

    def _pages(self, sequence: Sequence) -> dict[str, int]:
        """Pages for the longest that the sequence can become in each member.

        Main's completion is at most max_tokens; an assistant may need more tokens for the same text, up to its
        own max_len.
        """
        pages = {}
        for member, track in sequence.tracks.items():
            capacity = self._capacities[member]
            longest = capacity.max_len
            if member == sequence.recipe.main:
                longest = min(longest, len(track.prompt_ids) + sequence.request.params.max_tokens)
            pages[member] = -(-longest // capacity.page_size)
        return pages


def _untouched(sequence: Sequence) -> bool:
    return sequence.phase is Phase.PREFILL and not any(t.num_cached for t in sequence.tracks.values())


def _decode_share(sequence: Sequence) -> Share:
    counts = {member: sequence.tracks[member].num_uncached for member in sequence.consulted}
    return Share(sequence, counts, decides=True, prefill=False)


def _kinds(prompts: list[Sequence]) -> set[Kind]:
    """What prefilling these prompts will cost: members with more than a last token to go, and scoring."""
    scoring = any(s.scoring for s in prompts)
    kinds = {(member, scoring) for s in prompts for member, track in s.tracks.items() if track.num_uncached > 1}
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
    """All that is left of every member's prompt if it fits, else a chunk that leaves each its last token."""
    rest = {member: track.num_uncached for member, track in sequence.tracks.items()}
    ready = sequence.scores.num_ready if sequence.scores is not None and sequence.scoring else 0
    fits = all(count <= left[member] for member, count in rest.items())
    if fits and ready + sequence.scoring * rest[sequence.recipe.main] <= max(positions, LEAST):
        return Share(sequence, rest, decides=True, prefill=True)
    chunks = {member: min(count - 1, left[member]) for member, count in rest.items()}
    counts = {member: count for member, count in chunks.items() if count > 0}
    if not sequence.scoring:
        return Share(sequence, counts, decides=False, prefill=True)
    scores = int(min(ready + counts.get(sequence.recipe.main, 0), max(positions, 0)))
    return Share(sequence, counts, decides=False, prefill=True, scores=scores)


def _spend(left: dict[str, int], counts: Mapping[str, int]) -> None:
    for member, count in counts.items():
        left[member] = max(0, left[member] - count)

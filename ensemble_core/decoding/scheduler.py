"""Decides which sequences run in the next step, and with how many tokens. No torch.

Sequences are admitted in order of arrival and priority, but places are shared among clients and requests
(`fairness.py`), and in all their members at once. A sequence reserves the pages that its
tokens need now and grows page by page. If a member runs out of pages, its youngest sequence is preempted: it goes
back to the head of the queue and is later computed again, prompt and completion. Admission reserves a spare page for
each running sequence that can grow. Decoding sequences go first in every step. The rest of the token budget goes to
chunks of prompts, limited by what `Pace` grants while streams are to be spared. The last token of a prompt is fed
to all members of the mode's plan in one step, the first that decides a token; a scored prompt reaches it once its
scores are nearly done.

A sequence begins once, when the token budget of all its members reaches it; then its cached prefix is looked up.
Sequences of one group have the same prompt. The first of them leads; the others wait until it has read the prompt,
then take over its prefix, scores and weights. No sequence waits for a prefix that is too short to reuse. Once one of
the group has read the prompt or failed, the others begin side by side, like requests without a group.

Invariants: a step never feeds more than a member's pages hold; an admitted sequence is in `running` until it is
preempted or retired; no sequence overtakes an older one of its request; the oldest sequence is never preempted, so
every sequence ends. Does not know tensors, forwards or fusion.
"""

from __future__ import annotations

import math
import time
from collections import abc, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ensemble_core.decoding.capacity import MOST_ANSWERS, Capacity, Limits
from ensemble_core.decoding.fairness import FairQueue, most_urgent
from ensemble_core.decoding.modes.base import mode_of
from ensemble_core.decoding.pace import Pace
from ensemble_core.decoding.rhythm import Rhythm
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.decoding.shares import Share, deciding_share, kinds, prefill_shares, spend, untouched
from ensemble_core.errors import InvalidRequestError, QueueFullError


class Scheduler:
    """The waiting and running sequences, and the pages that they reserve."""

    def __init__(self, capacities: Mapping[str, Capacity], limits: Limits) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._capacities = dict(capacities)
        self._limits = limits
        self._fresh: set[Sequence] = set()  # running, but have not begun
        self._settled = False  # while no place is free: nothing has changed since the last round of admission
        self._passed_over = False  # the last round of admission left some waiting
        self._reserved = 0  # places in the queue that councils have taken
        self._read: dict[str | None, Sequence] = {}  # group -> a sequence that has read the prompt, or failed
        self.pace = Pace(limits.max_stretch)
        self.rhythm = Rhythm()
        for name, capacity in capacities.items():
            assert capacity.page_size * capacity.num_pages >= capacity.max_len, f"{name}: too few pages for one"

    def attach(self, member: str, capacity: Capacity) -> None:
        """One more member."""
        assert capacity.page_size * capacity.num_pages >= capacity.max_len, f"{member}: too few pages for one"
        self._capacities[member] = capacity
        self._settled = False

    def detach(self, member: str) -> None:
        """One member less; no sequence may use it."""
        assert not self.using(member), f"{member} is in use"
        del self._capacities[member]

    def limit(self, limits: Limits) -> None:
        """Other limits from now on; what waits or runs beyond them stays."""
        self._limits, self._settled = limits, False
        self.pace.max_stretch = limits.max_stretch

    def using(self, member: str) -> list[Sequence]:
        """The running and waiting sequences that use a member."""
        return [s for s in (*self.running, *self.waiting) if member in s.tracks]

    @property
    def has_work(self) -> bool:
        """True while any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def reserved(self, member: str) -> int:
        """Pages of a member that running sequences need for their present tokens."""
        return sum(self._pages(s, member) for s in self.running if member in s.tracks)

    def add(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFullError, or InvalidRequestError if they can never fit."""
        if all(sequence.request.reserved for sequence in sequences):
            self._enqueue(sequences)
            return
        limits = self._limits
        if len(sequences) > limits.max_waiting:
            raise InvalidRequestError(
                f"prompts x n must be at most {limits.max_waiting} (scheduler.max_waiting), got {len(sequences)}",
                "n",
            )
        self._require_room(len(sequences))
        queued = sum(len(s.main.prompt_ids) for s in self.waiting)
        new = sum(len(s.main.prompt_ids) for s in sequences)
        if queued and queued + new > limits.max_queued_tokens:
            raise QueueFullError(
                f"{queued} prompt tokens wait already, and this request has {new}; at most "
                f"{limits.max_queued_tokens} may wait (scheduler.max_queued_tokens); try again later"
            )
        self._enqueue(sequences)

    def reserve(self, places: int) -> None:
        """Take places in the queue for sequences that come later.

        Raises QueueFullError, or InvalidRequestError where there will never be so many.
        """
        if places > self._limits.max_waiting:
            raise InvalidRequestError(
                f"prompts x n: this council asks {places} models at the same time for them, and at most "
                f"{self._limits.max_waiting} may wait (scheduler.max_waiting); send fewer",
                "n",
            )
        self._require_room(places)
        self._reserved += places

    def release(self, places: int) -> None:
        """Give back places that were reserved."""
        assert self._reserved >= places
        self._reserved -= places

    def _enqueue(self, sequences: list[Sequence]) -> None:
        self.waiting.extend(sequences)
        self._settled = False

    def _require_room(self, num: int) -> None:
        room = self._room()
        if num > room:
            raise QueueFullError(
                f"the queue has room for {max(room, 0)} sequences, this request needs {num}; try again "
                f"later, or raise scheduler.max_waiting ({self._limits.max_waiting})"
            )

    def _room(self) -> int:
        """Sequences that may still come: those that free places will take do not count as waiting.

        So a burst between two steps is not refused while places are free. A place is free if the last round of
        admission left nobody waiting: otherwise pages are short.
        """
        places = 0 if self._passed_over else self._limits.max_running - len(self.running)
        waiting = sum(not s.request.reserved for s in self.waiting) if self._reserved else len(self.waiting)
        return self._limits.max_waiting - waiting - self._reserved + places

    def schedule(self) -> list[Share]:
        """The shares of the next step, to be called after `admit`: all decodes, then prefill as the budget allows."""
        left = dict.fromkeys(self._capacities, self._limits.token_budget)
        shares = self._decode_shares([s for s in self.running if s.phase is Phase.DECODE])
        for share in shares:
            spend(left, share.counts)
        prompts = self._prompts()
        granted = self.pace.grant(kinds(prompts), len(shares), len(prompts), self._num_spared(shares, prompts))
        if granted == 0:
            return shares
        most = self._limits.token_budget if granted is None else granted
        if any(s.scoring or s.weighing for s in prompts):
            most = min(most, MOST_ANSWERS)
        left = {member: max(min(tokens, most), 1) for member, tokens in left.items()}  # 1: prompts make progress
        return shares + prefill_shares(prompts, left, math.inf if granted is None else granted)

    def _prompts(self) -> abc.Sequence[Sequence]:
        """Whose prompts the next step may read: those of the priority whose turn it is, without followers."""
        followers = self._followers()
        return most_urgent([s for s in self.running if s.phase is Phase.PREFILL and s not in followers])

    def _num_spared(self, shares: list[Share], prompts: abc.Sequence[Sequence]) -> int:
        """Decoding streams that prompts must not slow down too much: by default those that were there first.

        Streams of the same burst are not spared, since none of them would have begun if all prompts were read first.
        """
        watched = [share.sequence for share in shares if share.sequence.request.watched]
        spare, oldest = self._limits.spare, min((s.arrived for s in prompts), default=0.0)
        if spare == "none":
            return 0
        return sum(spare == "all" or (s.first_token is not None and s.first_token < oldest) for s in watched)

    def _decode_shares(self, sequences: list[Sequence]) -> list[Share]:
        """The next steps of decoding sequences, on one beat."""
        modes = [mode_of(s.recipe.mode) for s in sequences]
        prospects = [mode.prospect(s) for mode, s in zip(modes, sequences, strict=True)]
        beat = self.rhythm.beat([p for p in prospects if p is not None])
        plans = [mode.plan(s, beat) for mode, s in zip(modes, sequences, strict=True)]
        return [
            replace(deciding_share(s, plan, prefill=False), drafter=mode.drafter(s))
            for mode, s, plan in zip(modes, sequences, plans, strict=True)
        ]

    def beginners(self) -> Iterator[tuple[Sequence, Sequence | None]]:
        """Each admitted sequence once, when it begins, with a sequence of its group that has read the prompt, if any.

        Lazy: the caller must enter a sequence's cached prefix in its tracks before it asks for the next, since that
        decides how far the budget reaches. `schedule` feeds only sequences that have begun. Linear in the running
        sequences.
        """
        self._fresh = {s for s in self._fresh if untouched(s)}
        left = dict.fromkeys(self._capacities, self._limits.token_budget)
        for sequence in self._prompts() if self._fresh else ():
            if sequence.phase is not Phase.PREFILL:
                continue
            leader = self._leader(sequence)
            if sequence in self._fresh and (leader is not None or all(left[m] > 0 for m in sequence.tracks)):
                self._fresh.discard(sequence)
                yield sequence, leader
            for member, track in sequence.tracks.items():
                left[member] -= track.num_uncached - 1  # the least that `schedule` will spend

    def admit(self) -> list[Sequence]:
        """Make room for running sequences, then admit waiting ones, fairly among owners and in order for each.

        Returns the preempted sequences, youngest first. The caller must release them in every member.
        """
        preempted = self._make_room()
        if self.waiting and not (self._settled and len(self.running) >= self._limits.max_running):
            preempted += self._let_in()
            self._settled = True
        self._passed_over = bool(self.waiting)
        return preempted

    def _make_room(self) -> list[Sequence]:
        preempted: list[Sequence] = []
        for member, capacity in self._capacities.items():
            excess = self.reserved(member) - capacity.num_pages
            if excess > 0:
                preempted += self._preempt(member, excess)
        self._put_back(preempted)
        return preempted

    def _put_back(self, preempted: list[Sequence]) -> None:
        """To the head of the queue, the oldest first."""
        self.waiting.extendleft(sorted(preempted, key=lambda s: s.admitted or 0.0, reverse=True))

    def _preempt(self, member: str, excess: int) -> list[Sequence]:
        """Remove the youngest sequences from `running` until `excess` pages of a member are free."""
        preempted = []
        for sequence in [s for s in reversed(self.running) if member in s.tracks]:
            if excess <= 0:
                break
            excess -= self._pages(sequence, member)
            preempted.append(sequence)
        self._send_away(preempted)
        return preempted

    def _send_away(self, preempted: list[Sequence]) -> None:
        """Take sequences out of `running`."""
        for sequence in preempted:
            sequence.preempt()
        gone = set(preempted)
        self.running = [s for s in self.running if s not in gone]
        self._fresh -= gone
        self._read = {group: s for group, s in self._read.items() if s not in gone}

    def _let_in(self) -> list[Sequence]:
        """Admit while all claims fit; a sequence alone always fits. Returns those that made way for other owners.

        Linear in running and waiting sequences.
        """
        claimed = {m: sum(self._claim(s, m) for s in self.running if m in s.tracks) for m in self._capacities}
        queue = FairQueue(self.waiting, self.running)
        displaced: list[Sequence] = []
        while (sequence := queue.first()) is not None:
            if not self._fits(sequence, claimed, len(self.running)):
                sequence = queue.first(without_place=True)
                victims = [] if sequence is None else self._victims(sequence, queue, claimed)
                if sequence is None or not victims:
                    break
                self._send_away(victims)
                displaced += victims
            self._charge(sequence, claimed, 1)
            queue.take()
            self.running.append(sequence)
            self._fresh.add(sequence)
            sequence.phase, sequence.admitted = Phase.PREFILL, sequence.admitted or time.perf_counter()
        return self._leave(queue, displaced)

    def _victims(self, sequence: Sequence, queue: FairQueue, claimed: dict[str, int]) -> list[Sequence]:
        """The running sequences that make way, their claims given up; none if that would not be enough."""
        victims: list[Sequence] = []
        while not self._fits(sequence, claimed, len(self.running) - len(victims)):
            victim = queue.displaced(self.running, victims, sequence.request.priority)
            if victim is None:
                for each in victims:
                    self._charge(each, claimed, 1)
                return queue.restore(victims)
            self._charge(victim, claimed, -1)
            victims.append(victim)
        return victims

    def _charge(self, sequence: Sequence, claimed: dict[str, int], by: int) -> None:
        for member in sequence.tracks:
            claimed[member] += by * self._claim(sequence, member)

    def _fits(self, sequence: Sequence, claimed: Mapping[str, int], num_running: int) -> bool:
        """Whether there is a place, and pages beside those that running sequences claim."""
        if not num_running:
            return True
        pages = (claimed[m] + self._claim(sequence, m) <= self._capacities[m].num_pages for m in sequence.tracks)
        return num_running < self._limits.max_running and all(pages)

    def _leave(self, queue: FairQueue, displaced: list[Sequence]) -> list[Sequence]:
        """Take what was admitted out of the queue, and put what was displaced at its head."""
        if queue.taken:
            self.waiting = deque(s for s in self.waiting if s not in queue.taken)
        self._put_back(displaced)
        return displaced[::-1]

    def retire(self) -> list[Sequence]:
        """Remove finished sequences from all lists and return them."""
        finished = [s for s in (*self.running, *self.waiting) if s.is_finished]
        if finished:
            self._settled = False
            self.running = [s for s in self.running if not s.is_finished]
            self.waiting = deque(s for s in self.waiting if not s.is_finished)
            self._fresh.difference_update(finished)
            self._note_read(finished)
        return finished

    def _note_read(self, finished: list[Sequence]) -> None:
        """Stop followers from waiting for a leader that ended, unless it was aborted: then the next one leads.

        Also forget groups that have ended.
        """
        for sequence in finished:
            if sequence.request.group is not None and sequence.finish_reason != "abort":
                self._read.setdefault(sequence.request.group, sequence)
        if self._read:
            left = {s.request.group for s in (*self.running, *self.waiting)}
            self._read = {group: s for group, s in self._read.items() if group in left}

    def check(self) -> None:
        """Assert that all cached tokens fit, and that only running sequences have any. For tests and debugging."""
        for member, capacity in self._capacities.items():
            cached = [s.tracks[member].num_held for s in self.running if member in s.tracks]
            assert sum(-(-tokens // capacity.page_size) for tokens in cached) <= capacity.num_pages
        assert not any(track.num_cached for s in self.waiting for track in s.tracks.values())
        assert self._fresh <= set(self.running), "a sequence that does not run cannot begin"
        assert self._read.keys() <= {s.request.group for s in (*self.running, *self.waiting)}, "a group has ended"

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """Another sequence of its group that has read the prompt and has not failed, if any."""
        leader = self._read.get(sequence.request.group)
        if leader is None or leader is sequence or leader.finish_reason == "error":
            return None
        return leader

    def _followers(self) -> set[Sequence]:
        """Fresh sequences that wait for the first of their group to read the prompt."""
        first: dict[str, Sequence] = {}
        found = []
        for sequence in self.running if self._fresh else ():
            group = sequence.request.group
            if group is None or sequence.is_finished:
                continue
            if sequence.phase is Phase.DECODE:
                self._read[group] = sequence
            elif first.setdefault(group, sequence) is not sequence and sequence in self._fresh:
                found.append(sequence)
        unread = {s.request.group: s for s in found if s.request.group not in self._read}
        waiting = {group for group, one in unread.items() if self._can_follow(one)}  # they have the same prompt
        return {s for s in found if s.request.group in waiting}

    def _can_follow(self, sequence: Sequence) -> bool:
        """Whether it can take over anything from a leader: a long enough prefix, scores or weights."""
        lengths = {member: len(track.prompt_ids) for member, track in sequence.tracks.items()}
        if sequence.scoring or sequence.weighing:
            return max(lengths.values()) > 1
        return any(length > self._capacities[member].min_prefix for member, length in lengths.items())

    def _pages(self, sequence: Sequence, member: str) -> int:
        """Pages for the sequence's present tokens, including those that the member has yet to roll back."""
        track = sequence.tracks[member]
        return -(-max(len(track), track.num_held) // self._capacities[member].page_size)

    def _claim(self, sequence: Sequence, member: str) -> int:
        """Pages that admission must leave to a sequence: those that it needs now, and one more if it can grow.

        Main's completion has at most max_tokens; an assistant may need more tokens for the same text, up to its own
        max_len.
        """
        capacity, pages = self._capacities[member], self._pages(sequence, member)
        longest = capacity.max_len
        if member == sequence.recipe.main:
            longest = min(longest, len(sequence.main.prompt_ids) + sequence.request.params.max_tokens)
        return pages + (-(-longest // capacity.page_size) > pages)

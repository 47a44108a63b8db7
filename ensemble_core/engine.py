"""The engine: schedule, feed the members, decide, append, align, finish. One thread owns it.

Invariants: a sequence that ends for any reason gives back its pages in every member; a member's failure affects only
the sequences in the failed call (`decoding/failures.py`); an error caused by one request's data ends only that
request. Does not know threads, asyncio or HTTP, or how a mode decides.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from ensemble_core.decoding.capacity import Capacity, Limits
from ensemble_core.decoding.failures import Failures, fail, fault, last_output, own_fault
from ensemble_core.decoding.feeding import Feeding
from ensemble_core.decoding.habits import Habits, Kind
from ensemble_core.decoding.modes.base import Decision, Mode, Outcome, Turn, joined, mode_of
from ensemble_core.decoding.recipe import ModeChoice
from ensemble_core.decoding.requests import Output
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Phase, Sequence
from ensemble_core.decoding.step import Step
from ensemble_core.decoding.telemetry import Telemetry
from ensemble_core.errors import MemberError
from ensemble_core.members.base import Answers, Member
from ensemble_core.members.cores import Cores, ForwardCost
from ensemble_core.members.parallel import MemberPool
from ensemble_core.stats import Record, discard

News = tuple[int, Output]  # seq_id, what happened
_BUSY_SECONDS = 0.01  # longest single wait for busy members while no sequence can go on without them


class Engine:
    """The members, the sequences and the body of the loop."""

    def __init__(
        self,
        members: Mapping[str, Member],
        limits: Limits,
        num_candidates: int,
        record: Record = discard,
        *,
        prefix_reuse: bool = True,
        member_timeout: float | None = None,
        cores: Cores | None = None,
    ) -> None:
        """prefix_reuse: prompts reuse cached prefixes of other prompts; choices of one prompt always share theirs.

        member_timeout: seconds that a call to a member may take; None: no limit. cores: those that the CPU's members
        share; None: they step in turn.
        """
        self.members = dict(members)
        self.scheduler = Scheduler({name: _capacity(member) for name, member in members.items()}, limits)
        self._pool = MemberPool(members, member_timeout, cores)
        self._failures = Failures(self._pool, record, limits.token_budget)
        self._feeding = Feeding(members, self._failures, num_candidates)
        self._telemetry = Telemetry(record, self.scheduler)
        self._num_candidates = num_candidates
        self._prefix_reuse = prefix_reuse
        self._habits: dict[tuple[str, Kind], Habits] = {}  # of each model's drafts

    @property
    def has_work(self) -> bool:
        """True while any sequence runs or waits."""
        return self.scheduler.has_work

    def attach(self, member: Member, cost: ForwardCost | None = None) -> None:
        """Take in one more member, between steps. cost: of its forwards; None: as known from earlier."""
        self._pool.attach(member, cost)
        self.members[member.name] = member
        self._feeding.attach(member)
        self._failures.attach(member.name)
        self.scheduler.attach(member.name, _capacity(member))

    def can_detach(self, member: str) -> bool:
        """Whether nobody uses a member, and no late call holds it."""
        self._pool.settle()
        return not self.scheduler.using(member) and member not in self._pool.busy

    def detach(self, member: str) -> Member:
        """Let a member go that `can_detach`; nothing here holds it afterwards."""
        self.scheduler.detach(member)
        del self.members[member]
        self._telemetry.gone(member, self._pool.members[member])
        return self._pool.detach(member)

    def end_users(self, member: str, reason: str, *, go_on: bool) -> list[News]:
        """End the sequences that use a member. go_on: those whose recipe allows it go on without it."""
        for sequence in self.scheduler.using(member):
            if go_on:
                self._failures.take_away(sequence, member, reason)
            else:
                fail(sequence, reason)
        return self._retire()

    def limit(self, limits: Limits, *, prefix_reuse: bool) -> None:
        """Other limits from the next step on; what waits or runs stays."""
        self.scheduler.limit(limits)
        self._failures.max_behind = limits.token_budget
        self._prefix_reuse = prefix_reuse

    def forget(self, models: Iterable[str]) -> None:
        """What was learnt of the drafts of models, whose recipes are others from now on."""
        gone = set(models)
        self._habits = {key: habits for key, habits in self._habits.items() if key[0] not in gone}

    def add(self, sequences: list[Sequence]) -> None:
        """Queue sequences, all or none. Raises QueueFullError."""
        self.scheduler.add(sequences)
        for sequence in sequences:
            self._failures.note(sequence)
            drafted: Kind = "greedy" if sequence.request.params.greedy else "sampled"
            sequence.habits = self._habits_of(sequence.recipe.model, drafted)
            sequence.guess_habits = self._habits_of(sequence.recipe.model, "guessed")
        self._telemetry.queue()

    def _habits_of(self, model: str, kind: Kind) -> Habits:
        """A sequence's habits, that begin with those of all others."""
        return Habits(self._habits.setdefault((model, kind), Habits(kind=kind)), kind)

    def step(self) -> list[News]:
        """Take one step of all running sequences; returns the news of each sequence that got tokens or ended."""
        self._pool.settle()
        self._failures.see(self.scheduler.running)
        self._admit()
        step = Step(self._failures.feasible(self.scheduler.schedule()))
        if not step.shares:
            if self._pool.busy:
                self._pool.wait(_BUSY_SECONDS)
            return self._retire()
        self._feeding.prepare(step)
        step.attempts = self._pool.forward(step.feeds)
        self._feeding.collect(step)
        step.outcome = self._decide(step.turns, step.answers)
        news = self._append(step.outcome.decisions)
        self._align(step)
        self._failures.report(step.attempts)
        self._telemetry.step(step)
        return news + self._retire()

    def abort(self, seq_ids: Iterable[int]) -> list[News]:
        """End sequences now. Unknown ids are ignored."""
        wanted = set(seq_ids)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.seq_id in wanted and not sequence.is_finished:
                sequence.finish("abort")
        return self._retire()

    def report_caches(self) -> None:
        """Record the state of each member's cache, except for busy members."""
        self._pool.settle()
        self._failures.watch()
        for name in self.members.keys() - self._pool.busy:
            self._telemetry.cache(name, self.members[name])

    def close(self) -> None:
        """Stop the members' threads."""
        self._pool.close()

    def _admit(self) -> None:
        """Admit waiting sequences, and reuse what each member has cached of their prompts."""
        for sequence in self.scheduler.admit():
            self._telemetry.preemption(sequence)
            self._release(sequence)
        self._reuse()

    def _reuse(self) -> None:
        """Reuse cached prefixes of the prompts that begin now.

        A prompt that is scored or weighed needs an answer at every position, so it is computed in full.
        """
        for sequence, leader in self.scheduler.beginners():
            if sequence.first_token is None:
                sequence.num_reused = 0
            if leader is not None:
                sequence.follow(leader)
            shares = self._prefix_reuse or (leader is not None and leader.phase is Phase.DECODE)
            if sequence.scoring or sequence.weighing or not shares:
                continue
            prompts = {
                member: {sequence.seq_id: track.uncached(len(track) - 1)}
                for member, track in sequence.tracks.items()
                if len(track) > self.members[member].min_prefix and member not in self._pool.busy
            }
            for member, found in self._pool.reuse(prompts, sequence.request.salt).items():
                self._begin(sequence, member, found[sequence.seq_id])

    def _begin(self, sequence: Sequence, member: str, found: int | MemberError) -> None:
        """Take in how much of a prompt a member had cached, or that its look-up failed."""
        if isinstance(found, MemberError):
            self._failures.lose_to(sequence, member, found)
            return
        if member == sequence.recipe.main and sequence.first_token is None:
            sequence.num_reused = found  # a later recomputation is not reported to the client
        if found and member in sequence.tracks:
            sequence.tracks[member].cache(found)
            self._telemetry.prefix(member, found)

    def _decide(self, turns: list[Turn], answers: Mapping[str, Answers]) -> Outcome:
        """Let each mode decide its own sequences."""
        by_mode: dict[ModeChoice, list[Turn]] = {}
        for turn in turns:
            by_mode.setdefault(turn.sequence.recipe.mode, []).append(turn)
        return joined(self._decide_by(mode_of(mode), own, answers) for mode, own in by_mode.items())

    def _decide_by(self, mode: Mode, turns: list[Turn], answers: Mapping[str, Answers]) -> Outcome:
        """Decide a batch. If that raises, decide each turn alone, so that only the turn at fault fails."""
        try:
            return mode.decide(turns, answers, self._num_candidates)
        except Exception as error:
            if len(turns) > 1:
                return joined(self._decide_by(mode, [turn], answers) for turn in turns)
            return Outcome([Decision(turns[0].sequence, error=fault(turns[0].sequence, error))])

    def _append(self, decisions: list[Decision]) -> list[News]:
        """Apply the decisions to their sequences; returns the news of those that got tokens and go on."""
        news = []
        for decision in decisions:
            sequence = decision.sequence
            for member in decision.unsound:
                self._failures.lose_unsound(sequence, member)
            if decision.error is not None:
                fail(sequence, decision.error)
            if sequence.is_finished:
                continue
            with own_fault(sequence):
                sequence.decide(decision.tokens, decision.draft, decision.ends, decision.ahead)
                for verdict in decision.verdicts:
                    (sequence.guess_habits if verdict.guess else sequence.habits).learn(verdict)
                if decision.tokens:
                    self._telemetry.tokens(sequence)
                    if not sequence.is_finished:
                        news.append((sequence.seq_id, sequence.take()))
        return news

    def _align(self, step: Step) -> None:
        """Respell the new text in every assistant. Its next feed rolls back the cached tokens that changed."""
        started = time.perf_counter()
        for sequence in (turn.sequence for turn in step.turns):
            with own_fault(sequence):
                if not sequence.is_finished:
                    self._respell(sequence, step.rollbacks)
        step.alignment_seconds = time.perf_counter() - started

    def _respell(self, sequence: Sequence, rollbacks: dict[str, int]) -> None:
        common, mid_character = sequence.spelling
        is_drafted = len(sequence.drafted) > sequence.num_guessed
        known = sequence.ahead is not None or (sequence.ends is not None and not is_drafted)
        for member in sequence.recipe.members[1:]:
            track, text = sequence.tracks[member], common + sequence.ahead_of(member)
            if (known or mid_character) and track.spells(text):
                continue  # nobody needs another answer there
            if dropped := track.respell(text):
                rollbacks[member] = rollbacks.get(member, 0) + dropped
            if len(track) > self.members[member].max_len:
                self._overflow(sequence, member, rollbacks)
                return
        if sequence.drafted and sequence.drafted[0].held:
            text = sequence.spelling_of(len(sequence.drafted) - sequence.num_guessed)[0]
            full = [member for member in sequence.recipe.members[1:] if not sequence.tracks[member].holds(text)]
            if full:
                self._overflow(sequence, full[0], rollbacks)

    def _overflow(self, sequence: Sequence, member: str, rollbacks: dict[str, int]) -> None:
        """An assistant cannot hold the text: it drafts no further ahead, or goes, or the text ends; see `Recipe`."""
        if sequence.cramp():
            self._respell(sequence, rollbacks)
        elif sequence.recipe.on_full == "drop":
            sequence.relax()
            self._failures.lose_full(sequence, member)
            self._respell(sequence, rollbacks)
        else:
            sequence.finish("length")

    def _retire(self) -> list[News]:
        """Release finished sequences in every member; returns their last news."""
        news = []
        for sequence in self.scheduler.retire():
            self._release(sequence)
            news.append((sequence.seq_id, last_output(sequence)))
            self._telemetry.request(sequence)
        if news:
            self._telemetry.queue()
        return news

    def _release(self, sequence: Sequence) -> None:
        """Give back its pages in every member. Finite prefixes may be reused by other sequences."""
        keep = self._prefix_reuse and sequence.finish_reason != "error"
        for member in sequence.tracks:
            self._pool.release(member, sequence.seq_id, keep)


def _capacity(member: Member) -> Capacity:
    return Capacity(member.page_size, member.num_pages, member.max_len, member.min_prefix)

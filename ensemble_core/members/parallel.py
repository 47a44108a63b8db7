"""The calls to members: those of different lanes at the same time, those of one lane in turn.

Members of this machine's CPU share its cores out among them where they step together (`cores.share_out`); each then
works in a thread that may use so many.

A call cannot be interrupted. With a time-out each member has a thread of its own, which is left behind where a call
is late: the member is busy until that call returns. Meanwhile nobody else may touch it, so releases wait until it is
back.

Invariants: whatever a member raises is a MemberError of that call and stops no other; a busy member is not called;
the caller's own number of threads is as it was when a call returns. Knows feeds and members; does not know sequences,
fusion or schedules.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from ensemble_core.errors import MemberError, MemberLostError, MemberTimeoutError
from ensemble_core.members.base import Answers, Feed, Member
from ensemble_core.members.cores import Cores, ForwardCost, Team
from ensemble_core.members.threads import Allotment, allotment, threads
from ensemble_core.stats import Cause

logger = logging.getLogger(__name__)

T = TypeVar("T")
CPU = "cpu"  # the lane of members that share this machine's cores


@dataclass(frozen=True, slots=True)
class Attempt:
    """A member's forward: its answers, or why there are none."""

    answers: Answers | None
    error: MemberError | None
    started: float  # time.perf_counter
    returned: float

    @property
    def ended(self) -> float:
        """When the forward was over, which may be after it returned; waits for it."""
        clock = None if self.answers is None else self.answers.clock
        return self.returned if clock is None else self.started + clock()

    @property
    def failure(self) -> Cause | None:
        """How the forward failed, if it did."""
        return None if self.error is None else cause_of(self.error)


def cause_of(error: MemberError) -> Cause:
    """How a member failed."""
    if isinstance(error, MemberLostError):
        return "lost"
    return "timeout" if isinstance(error, MemberTimeoutError) else "exception"


@dataclass(frozen=True, slots=True)
class _Late:
    """A call that nobody waits for any more, and what is to be done with its member afterwards."""

    future: Future[Any]
    since: float  # time.perf_counter, when it was given up
    put_off: list[Callable[[], None]] = field(default_factory=list)


class MemberPool:
    """The resident members, and a thread for each team of them but one.

    timeout: seconds that a call may take; each member then has a thread of its own. None: any. cores: what members on
    this machine's CPU share; None: they work in turn.
    """

    def __init__(
        self, members: Mapping[str, Member], timeout: float | None = None, cores: Cores | None = None
    ) -> None:
        self.members = dict(members)
        self._timeout, self._cores = timeout, cores or Cores()
        self._num_threads = torch.get_num_threads()  # of a thread that nothing is said of
        self._threads = self._team_threads()
        self._workers = {name: _Worker(name) for name in members} if timeout is not None else {}
        self._late: dict[str, _Late] = {}

    def attach(self, member: Member, cost: ForwardCost | None = None) -> None:
        """One more member. cost: of its forwards, if it shares this machine's cores; None: as known before."""
        assert member.name not in self.members, f"{member.name} is there already"
        self.members[member.name] = member
        if cost is not None:
            self._cores = replace(self._cores, costs={**self._cores.costs, member.name: cost})
        if self._timeout is not None:
            self._workers[member.name] = _Worker(member.name)
        self._recount()

    def detach(self, name: str) -> Member:
        """One member less; nobody may hold anything of it, and it must not be busy."""
        assert name not in self._late, f"{name} is busy"
        if (worker := self._workers.pop(name, None)) is not None:
            worker.close()
        member = self.members.pop(name)
        self._recount()
        return member

    def _recount(self) -> None:
        """As many threads as the members can use; those there are idle."""
        if self._threads is not None:
            self._threads.shutdown()
        self._threads = self._team_threads()

    def _team_threads(self) -> ThreadPoolExecutor | None:
        most = len(self._teams(dict.fromkeys(self.members, 1.0), self._cores))
        return ThreadPoolExecutor(most - 1, "team") if most > 1 else None

    @property
    def busy(self) -> frozenset[str]:
        """Members of which a call was late and, as of the last `settle`, has not returned."""
        return frozenset(self._late)

    def is_stuck(self, member: str) -> bool:
        """Whether a busy member has been given up for longer than a call may take."""
        assert self._timeout is not None
        return time.perf_counter() - self._late[member].since > self._timeout

    def forward(self, feeds: Mapping[str, Sequence[Feed]]) -> dict[str, Attempt]:
        """`Member.forward` of every member that has feeds. None of them may be busy."""
        work = {name: self._work(name, own) for name, own in feeds.items()}
        calls = {name: partial(self._forward, name, own) for name, own in feeds.items()}
        return self._overlap(calls, self._teams(work, self._cores))

    def reuse(
        self, prompts: Mapping[str, Mapping[int, Sequence[int]]], salt: str = ""
    ) -> dict[str, dict[int, int | MemberError]]:
        """`Member.reuse` of every member's sequences: member -> seq_id -> tokens cached, or how it failed.

        prompts: member -> seq_id -> ids. salt: of all of them. None of the members may be busy.
        """
        calls = {name: partial(self._reuse, name, own, salt) for name, own in prompts.items()}
        in_turn = Cores()  # the calls are too short to share cores for
        return self._overlap(calls, self._teams(dict.fromkeys(prompts, 1.0), in_turn))

    def release(self, member: str, seq_id: int, keep: bool = False) -> None:
        """`Member.release`, now or when the member is back. A failure is logged: nobody works on it any more."""
        if member in self._late:
            self._late[member].put_off.append(partial(self.release, member, seq_id, keep))
            return
        try:
            self._call(member, partial(self.members[member].release, seq_id, keep))
        except MemberError as error:
            logger.warning("sequence %d is not released: %s", seq_id, error)

    def settle(self) -> None:
        """See who is back, and do what was put off, in order."""
        for name in [name for name, late in self._late.items() if late.future.done()]:
            late = self._late.pop(name)
            logger.warning("member %s is back, %.1f s late", name, time.perf_counter() - late.since)
            if (error := late.future.exception()) is not None:
                logger.warning("member %s: its late call failed: %s", name, error)
            for call in late.put_off:
                call()

    def wait(self, seconds: float) -> None:
        """Until one of those that are busy returns, at most so long."""
        wait([late.future for late in self._late.values()], seconds, "FIRST_COMPLETED")

    def close(self) -> None:
        """End the members and the threads; one that is still in a late call ends with the process."""
        for member in self.members.values():
            member.close()
        if self._threads is not None:
            self._threads.shutdown()
        for worker in self._workers.values():
            worker.close()

    def _overlap(self, calls: Mapping[str, Callable[[], T]], teams: Sequence[Team]) -> dict[str, T]:
        """Make a call of each member, team by team, the last team's here; none of them raises."""
        for name in calls:
            assert name not in self._late, f"{name} is busy"
        *others, own = teams or [Team((), 0)]
        share = Allotment(own.cores or self._num_threads)

        def elsewhere(team: Team) -> dict[str, T]:
            with threads(Allotment(team.cores or self._num_threads)):
                done = {name: calls[name]() for name in team.members}
            share.add(team.cores)
            return done

        begun = [self._threads.submit(elsewhere, team) for team in others] if self._threads is not None else []
        assert len(begun) == len(others)
        with threads(share):
            found = {name: calls[name]() for name in own.members}
        for each in begun:
            found |= each.result()
        return {name: found[name] for name in calls}

    def _teams(self, work: Mapping[str, float], cores: Cores) -> list[Team]:
        """Members that work at the same time, those of one team in turn; the longest on the CPU last.

        work: seconds of each. cores: what those on the CPU share.
        """
        lanes: dict[str, list[str]] = {}
        for name in work:
            lanes.setdefault(self.members[name].lane, []).append(name)
        on_cpu = cores.teams({name: work[name] for name in lanes.pop(CPU, [])})
        return [*(Team(tuple(lane), 0) for lane in lanes.values()), *on_cpu]

    def _work(self, name: str, feeds: Sequence[Feed]) -> float:
        """Seconds that a forward is expected to take."""
        if (cost := self._cores.costs.get(name)) is None:
            return 1.0
        return cost(sum(len(feed.token_ids) for feed in feeds), sum(feed.wanted for feed in feeds))

    def _forward(self, name: str, feeds: Sequence[Feed]) -> Attempt:
        started = time.perf_counter()
        try:
            member = self.members[name]
            forward = (
                partial(_finished, member, feeds) if self._timeout is not None else partial(member.forward, feeds)
            )
            answers, error = self._call(name, forward), None
        except MemberError as failure:
            answers, error = None, failure
        return Attempt(answers, error, started, time.perf_counter())

    def _reuse(self, name: str, prompts: Mapping[int, Sequence[int]], salt: str) -> dict[int, int | MemberError]:
        found: dict[int, int | MemberError] = {}
        for seq_id, token_ids in prompts.items():
            try:
                found[seq_id] = self._call(name, partial(self.members[name].reuse, seq_id, token_ids, salt))
            except MemberError as error:
                found[seq_id] = error
        return found

    def _call(self, name: str, call: Callable[[], T]) -> T:
        """Here, or in the member's thread with an eye on the clock. Raises MemberError."""
        if name in self._late:
            raise MemberError(name, "an earlier call has not returned")
        try:
            if self._timeout is None:
                return call()
            future = self._workers[name].submit(partial(_on, allotment(), call))
            wait([future], self._timeout)
            if future.done():
                return future.result()
        except MemberError:
            raise
        except Exception as error:
            logger.exception("member %s raised", name)
            raise MemberError(name, f"{type(error).__name__}: {error}") from error
        self._late[name] = _Late(future, time.perf_counter())
        raise MemberTimeoutError(name, f"it took longer than scheduler.member_timeout, {self._timeout:g} s")


def _on(share: Allotment, call: Callable[[], T]) -> T:
    """A call in another thread, with the cores of its caller."""
    with threads(share):
        return call()


def _finished(member: Member, feeds: Sequence[Feed]) -> Answers:
    """A forward's answers, once they are there: on CUDA a call returns before its kernels have run."""
    answers = member.forward(feeds)
    if member.device.type == "cuda":
        torch.cuda.current_stream(member.device).synchronize()
    return answers


class _Worker:
    """A thread that may be left behind: unlike an executor's, nobody waits for it when the process ends."""

    def __init__(self, member: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"member-{member}", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run it after what was submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """End the thread after what it does."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

"""One step's forwards: members on different devices at the same time, members of one device in turn.

A forward cannot be interrupted. With a time-out each member has a thread of its own, which is left behind where its
forward is late: the member is busy until that forward returns. Meanwhile nobody else may touch it, so what is to
become of its cache is put off until it is back.

Invariant: one member's failure is that member's answer and stops no other. Knows feeds and members; does not know
sequences, fusion or schedules.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue

import torch

from ensemble_core.errors import MemberError, MemberTimeoutError
from ensemble_core.members.base import Candidates, Feed, Member
from ensemble_core.stats import Cause

logger = logging.getLogger(__name__)

_Forward = Callable[[], Candidates]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one member made of its feeds: candidates, or why there are none."""

    candidates: Candidates | None
    error: MemberError | None
    started: float  # time.perf_counter
    returned: float

    @property
    def ended(self) -> float:
        """When the forward was over, which may be after it returned; waits for it."""
        clock = None if self.candidates is None else self.candidates.clock
        return self.returned if clock is None else self.started + clock()

    @property
    def failure(self) -> Cause | None:
        """How the forward failed, if it did."""
        if self.error is None:
            return None
        return "timeout" if isinstance(self.error, MemberTimeoutError) else "exception"


@dataclass(frozen=True, slots=True)
class _Late:
    """A forward that nobody waits for any more, and what is to be done with its member afterwards."""

    future: Future[Candidates]
    since: float  # time.perf_counter, when it was given up
    put_off: list[Callable[[], None]] = field(default_factory=list)


class MemberPool:
    """The resident members, and a thread for each device but one.

    timeout: seconds that a forward may take; each member then has a thread of its own. None: any.
    """

    def __init__(self, members: Mapping[str, Member], timeout: float | None = None) -> None:
        self.members = dict(members)
        self._timeout = timeout
        devices = {str(member.device) for member in members.values()}
        self._threads = ThreadPoolExecutor(len(devices), "forward") if len(devices) > 1 else None
        self._workers = {name: _Worker(name) for name in members} if timeout is not None else {}
        self._late: dict[str, _Late] = {}

    @property
    def busy(self) -> frozenset[str]:
        """Members whose forward was late and, as of the last `settle`, has not returned."""
        return frozenset(self._late)

    def is_stuck(self, member: str) -> bool:
        """Whether a busy member has been given up for longer than a forward may take."""
        assert self._timeout is not None
        return time.perf_counter() - self._late[member].since > self._timeout

    def forward(self, feeds: Mapping[str, Sequence[Feed]], top_k: Mapping[str, int]) -> dict[str, Answer]:
        """Run every member that has feeds; member -> answer. None of them may be busy."""
        queues: dict[str, list[str]] = {}
        for name in feeds:
            assert name not in self._late, f"{name} is busy"
            queues.setdefault(str(self.members[name].device), []).append(name)

        def run(names: list[str]) -> dict[str, Answer]:
            return {name: self._forward(name, feeds[name], top_k[name]) for name in names}

        if self._threads is None or len(queues) == 1:
            parts = [run(names) for names in queues.values()]
        else:
            parts = list(self._threads.map(run, queues.values()))
        return {name: answer for part in parts for name, answer in part.items()}

    def rollback(self, member: str, seq_id: int, length: int) -> None:
        """`Member.rollback`, now or when the member is back."""
        self._do(member, partial(self.members[member].rollback, seq_id, length))

    def release(self, member: str, seq_id: int, keep: bool = False) -> None:
        """`Member.release`, now or when the member is back."""
        self._do(member, partial(self.members[member].release, seq_id, keep))

    def settle(self) -> None:
        """See who is back, and do what was put off, in order. Raises what a forward raised but for MemberError."""
        for name in [name for name, late in self._late.items() if late.future.done()]:
            late = self._late.pop(name)
            logger.warning("member %s is back, %.1f s late", name, time.perf_counter() - late.since)
            for call in late.put_off:
                call()
            error = late.future.exception()
            if error is not None and not isinstance(error, MemberError):
                raise error

    def wait(self, seconds: float) -> None:
        """Until one of those that are busy returns, at most so long."""
        wait([late.future for late in self._late.values()], seconds, "FIRST_COMPLETED")

    def close(self) -> None:
        """End the threads; one that is still in a late forward ends with the process."""
        if self._threads is not None:
            self._threads.shutdown()
        for worker in self._workers.values():
            worker.close()

    def _do(self, member: str, call: Callable[[], None]) -> None:
        if member in self._late:
            self._late[member].put_off.append(call)
        else:
            call()

    def _forward(self, name: str, feeds: Sequence[Feed], top_k: int) -> Answer:
        started = time.perf_counter()
        try:
            candidates, error = self._run(name, partial(self.members[name].forward, feeds, top_k)), None
        except MemberError as failure:
            candidates, error = None, failure
        return Answer(candidates, error, started, time.perf_counter())

    def _run(self, name: str, forward: _Forward) -> Candidates:
        """Here, or in the member's thread with an eye on the clock. Raises MemberTimeoutError."""
        if self._timeout is None:
            return forward()
        future = self._workers[name].submit(partial(_finished, name, forward))
        wait([future], self._timeout)
        if not future.done():
            self._late[name] = _Late(future, time.perf_counter())
            raise MemberTimeoutError(
                name, f"its forward took longer than scheduler.member_timeout, {self._timeout:g} s"
            )
        return future.result()


def _finished(name: str, forward: _Forward) -> Candidates:
    """A forward's answer, once it is there: on CUDA a call returns before its kernels have run."""
    candidates = forward()
    if candidates.tail.is_cuda:
        try:
            torch.cuda.current_stream(candidates.tail.device).synchronize()
        except RuntimeError as error:
            raise MemberError(name, f"forward failed: {error}") from error
    return candidates


class _Worker:
    """A thread that may be left behind: unlike an executor's, nobody waits for it when the process ends."""

    def __init__(self, member: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Candidates], _Forward] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=f"forward-{member}", daemon=True).start()

    def submit(self, forward: _Forward) -> Future[Candidates]:
        """Run it after what was submitted before."""
        future: Future[Candidates] = Future()
        self._calls.put((future, forward))
        return future

    def close(self) -> None:
        """End the thread after what it does."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, forward = item
            try:
                future.set_result(forward())
            except BaseException as error:
                future.set_exception(error)

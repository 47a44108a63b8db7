"""Late forwards: the pool goes on without them, and later makes the calls that it put off."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from fakes import FakeMember

from ensemble_core.errors import MemberError, MemberTimeoutError
from ensemble_core.members.base import Answers, Feed
from ensemble_core.members.cores import Cores, ForwardCost
from ensemble_core.members.parallel import Attempt, MemberPool
from ensemble_core.members.threads import grow

LATE = 0.4  # seconds; far more than a fake's forward takes
Members = dict[str, FakeMember]


@pytest.fixture
def members() -> Iterator[Members]:
    made = {name: FakeMember(name, lane=lane) for name, lane in (("a", "cpu"), ("b", "cpu"), ("c", "gpu"))}
    yield made
    for member in made.values():
        member.gate.set()


def forward(pool: MemberPool, *names: str, seq_id: int = 1) -> dict[str, Attempt]:
    return pool.forward({name: [Feed(seq_id, [97, 98], top_k=4)] for name in names})


def settle(pool: MemberPool) -> None:
    deadline = time.monotonic() + 5.0
    while pool.busy:
        assert time.monotonic() < deadline, "the member does not come back"
        pool.wait(0.05)
        pool.settle()


def test_a_late_forward_is_a_failure_and_harms_no_other(members: Members) -> None:
    pool = MemberPool(members, LATE)
    members["a"].gate.clear()
    answers = forward(pool, "a", "b", "c")
    assert (answers["a"].failure, answers["a"].answers) == ("timeout", None)
    assert "member_timeout" in str(answers["a"].error)
    assert LATE <= answers["a"].ended - answers["a"].started < LATE + 5.0
    assert answers["b"].failure is answers["c"].failure is None
    assert pool.busy == {"a"}
    assert not pool.is_stuck("a") or time.perf_counter() - answers["a"].ended > LATE
    time.sleep(LATE)
    assert pool.is_stuck("a")
    members["a"].gate.set()
    settle(pool)
    assert forward(pool, "a", seq_id=2)["a"].failure is None
    pool.close()


def test_nobody_touches_a_busy_member(members: Members) -> None:
    pool, member = MemberPool(members, LATE), members["a"]
    forward(pool, "a", seq_id=7)
    member.gate.clear()
    forward(pool, "a", seq_id=8)
    pool.release("a", 7)
    assert member.cached == {7: [97, 98]}
    pool.settle()
    assert pool.busy == {"a"}
    with pytest.raises(AssertionError, match="busy"):
        forward(pool, "a", seq_id=9)
    member.gate.set()
    settle(pool)
    assert member.cached == {8: [97, 98]}
    pool.release("a", 8)
    assert member.is_empty
    pool.close()


def test_what_a_late_call_raises_is_logged_when_it_is_back(
    members: Members, caplog: pytest.LogCaptureFixture
) -> None:
    pool = MemberPool(members, LATE)
    members["a"].gate.clear()
    members["a"].breaks = ZeroDivisionError("a bug")
    forward(pool, "a")
    members["a"].gate.set()
    settle(pool)
    assert "its late call failed: a bug" in caplog.text
    members["b"].fails_on = {1}
    assert forward(pool, "b")["b"].failure == "exception"
    pool.close()


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_whatever_a_member_raises_is_a_failure_of_that_call(members: Members, timeout: float | None) -> None:
    pool, bug = MemberPool(members, timeout), ZeroDivisionError("a bug")
    members["a"].breaks = bug
    members["a"].broken_calls = {"reuse": bug, "release": bug}
    attempts = forward(pool, "a", "b", "c")
    assert attempts["a"].failure == "exception"
    assert "ZeroDivisionError: a bug" in str(attempts["a"].error)
    assert attempts["b"].failure is attempts["c"].failure is None
    found = pool.reuse({"a": {2: [97]}, "b": {2: [97], 3: [97, 98]}})
    assert isinstance(found["a"][2], MemberError)
    assert found["b"] == {2: 1, 3: 2}
    pool.release("a", 1)  # no caller is left to report to
    pool.release("b", 1)
    assert members["b"].cached.keys() == {2, 3}
    pool.close()


def test_a_late_reuse_is_a_failure(members: Members) -> None:
    pool, gate = MemberPool(members, LATE), threading.Event()

    def blocked(seq_id: int, token_ids: object, salt: str) -> int:
        gate.wait(10.0)
        return 0

    members["a"].reuse = blocked  # type: ignore[method-assign, assignment]
    found = pool.reuse({"a": {5: [97], 6: [98]}})["a"]
    assert [type(each) for each in found.values()] == [MemberTimeoutError, MemberError]
    assert pool.busy == {"a"}
    gate.set()
    settle(pool)
    pool.close()


def test_without_a_time_out_forwards_run_in_the_callers_thread() -> None:
    members = {"a": FakeMember("a")}
    pool = MemberPool(members)
    forward(pool, "a")
    assert members["a"].threads == {"MainThread"}
    pool.close()
    timed = MemberPool(members, 30.0)
    forward(timed, "a", seq_id=2)
    assert members["a"].threads == {"MainThread", "member-a"}
    timed.close()


class Watched(FakeMember):
    """Notes how many threads each forward has; the forwards of one meeting wait for each other."""

    def __init__(self, name: str, lane: str, meeting: threading.Barrier) -> None:
        super().__init__(name, lane=lane)
        self.seen: list[int] = []
        self.meeting: threading.Barrier | None = meeting

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        if self.meeting is not None:
            self.meeting.wait()
        self.seen.append(torch.get_num_threads())
        return super().forward(feeds)


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_members_of_the_cpu_share_its_cores_where_they_step_together(timeout: float | None) -> None:
    """Each forward has its share of the threads; the caller's own number is as it was."""
    before, meeting = torch.get_num_threads(), threading.Barrier(3, timeout=10.0)
    watched = {name: Watched(name, lane, meeting) for name, lane in (("a", "cpu"), ("b", "cpu"), ("c", "gpu"))}
    pool = MemberPool(watched, timeout, Cores(3, {"a": ForwardCost(1.0), "b": ForwardCost(3.0)}))
    together = forward(pool, "c", "a", "b")
    assert list(together) == ["c", "a", "b"]
    watched["b"].meeting = None
    alone = forward(pool, "b", seq_id=2)
    assert all(attempt.error is None for attempt in (*together.values(), *alone.values()))
    assert {name: member.seen for name, member in watched.items()} == {"a": [1], "b": [2, 3], "c": [before]}
    assert torch.get_num_threads() == before
    pool.close()


class Patient(FakeMember):
    """Waits in its forward until another one is over, and then takes what cores there are."""

    def __init__(self, name: str, other: FakeMember) -> None:
        super().__init__(name, lane="cpu")
        self.other, self.seen = other, [0]

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        deadline = time.monotonic() + 10.0
        while self.seen[-1] < 3 and time.monotonic() < deadline:
            grow()
            self.seen.append(torch.get_num_threads())
            time.sleep(0.01)
        return super().forward(feeds)


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_the_longest_forward_takes_over_the_cores_of_the_others(timeout: float | None) -> None:
    before, quick = torch.get_num_threads(), FakeMember("a", lane="cpu")
    slow = Patient("b", quick)
    pool = MemberPool({"a": quick, "b": slow}, timeout, Cores(3, {"a": ForwardCost(1.0), "b": ForwardCost(3.0)}))
    quick.gate.clear()
    threading.Timer(0.1, quick.gate.set).start()
    forward(pool, "a", "b")
    assert (slow.seen[1], slow.seen[-1]) == (2, 3)
    assert torch.get_num_threads() == before
    pool.close()

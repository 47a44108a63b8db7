"""Forwards that are late: the pool goes on without them, and does later what was put off."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from fakes import FakeMember

from ensemble_core.members.base import Feed
from ensemble_core.members.parallel import Answer, MemberPool

LATE = 0.4  # seconds; far more than a fake's forward takes
Members = dict[str, FakeMember]


@pytest.fixture
def members() -> Iterator[Members]:
    made = {name: FakeMember(name, device=device) for name, device in (("a", "cpu"), ("b", "cpu"), ("c", "meta"))}
    yield made
    for member in made.values():
        member.gate.set()


def forward(pool: MemberPool, *names: str, seq_id: int = 1) -> dict[str, Answer]:
    return pool.forward({name: [Feed(seq_id, [97, 98])] for name in names}, dict.fromkeys(names, 4))


def settle(pool: MemberPool) -> None:
    deadline = time.monotonic() + 5.0
    while pool.busy:
        assert time.monotonic() < deadline, "nobody comes back"
        pool.wait(0.05)
        pool.settle()


def test_a_late_forward_is_a_failure_and_harms_no_other(members: Members) -> None:
    pool = MemberPool(members, LATE)
    members["a"].gate.clear()
    answers = forward(pool, "a", "b", "c")
    assert (answers["a"].failure, answers["a"].candidates) == ("timeout", None)
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
    pool.rollback("a", 7, 1)
    pool.release("a", 8)
    assert (member.cached, member.rollbacks) == ({7: [97, 98]}, [])
    pool.settle()
    assert pool.busy == {"a"}
    with pytest.raises(AssertionError, match="busy"):
        forward(pool, "a", seq_id=9)
    member.gate.set()
    settle(pool)
    assert (member.cached, member.rollbacks) == ({7: [97]}, [(7, 1)])
    pool.release("a", 7)
    assert member.is_empty
    pool.close()


def test_what_a_late_forward_raises_is_told_when_it_is_back(members: Members) -> None:
    pool = MemberPool(members, LATE)
    members["a"].gate.clear()
    members["a"].breaks = ZeroDivisionError("a bug")
    forward(pool, "a")
    members["a"].gate.set()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        settle(pool)
    members["b"].fails_on = {1}
    assert forward(pool, "b")["b"].failure == "exception"
    pool.close()


def test_without_a_time_out_forwards_run_in_the_callers_thread() -> None:
    members = {"a": FakeMember("a")}
    pool = MemberPool(members)
    forward(pool, "a")
    assert members["a"].threads == {"MainThread"}
    pool.close()
    timed = MemberPool(members, 30.0)
    forward(timed, "a", seq_id=2)
    assert members["a"].threads == {"MainThread", "forward-a"}
    timed.close()

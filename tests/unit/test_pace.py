"""The pace of prefill on simulated machines: steps stay as short as they may be, and prompts go on."""

from __future__ import annotations

import itertools
import random

import pytest

from ensemble_core.decoding.pace import LEAST, Pace, Work, WorkKind

KINDS: tuple[WorkKind, ...] = (("alpha", False), ("beta", False))


class Machine:
    """Decoding takes a base and so much a row in each member; a chunk takes a start and so much a token."""

    def __init__(self, pace: Pace, start: float = 0.0, token: float = 1.0, noise: float = 0.0) -> None:
        self.pace, self.start, self.token, self.noise = pace, start, token, noise
        self.rng = random.Random(0)

    def decoding(self, num_rows: int) -> float:
        return 25.0 + 2.0 * num_rows if num_rows else 0.0

    def step(self, num_rows: int, num_tokens: int, slow: float = 1.0) -> float:
        """One step, recorded; how long it took."""
        parts = {}
        for kind in KINDS:
            seconds = self.decoding(num_rows) + (self.start + self.token * num_tokens if num_tokens else 0.0)
            seconds *= slow * self.rng.uniform(1.0, 1.0 + self.noise)
            parts[kind] = Work(seconds, num_tokens, num_rows > 0)
        total = sum(work.seconds for work in parts.values())
        self.pace.record(num_rows, total, parts)
        return total

    def granted_step(self, num_rows: int, slow: float = 1.0) -> tuple[int, float]:
        granted = self.pace.grant(KINDS, num_rows)
        assert granted is not None
        return granted, self.step(num_rows, granted, slow)


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("start", [0.0, 5.0])
@pytest.mark.parametrize("token", [0.05, 0.5])
@pytest.mark.parametrize("stretch", [2.0, 3.0])
def test_steps_become_as_long_as_they_may_be(rows: int, start: float, token: float, stretch: float) -> None:
    machine = Machine(Pace(stretch), start, token, noise=0.02)
    machine.step(0, 20)
    steps = [machine.granted_step(rows) for _ in range(60)]
    longest = stretch * 2 * machine.decoding(rows)
    assert all(seconds <= 1.15 * longest or tokens == LEAST for tokens, seconds in steps)
    assert all(seconds >= 0.85 * longest for _, seconds in steps[-10:])
    assert [tokens for tokens, _ in steps].count(0) == 2


def test_a_crowd_of_prompts_stretches_the_limit_threefold_at_most() -> None:
    machine = Machine(Pace(2.0), token=0.5)
    machine.step(0, 50)
    for _ in range(30):
        machine.granted_step(4)
    room = 2 * machine.decoding(4)  # of a step twice as long as one without a prompt
    for num_prompts, rooms in ((1, 1), (4, 1), (8, 3), (400, 5)):
        for _ in range(5):
            granted = machine.pace.grant(KINDS, 4, num_prompts)
            assert granted is not None
            machine.step(4, granted)
        assert granted * 2 * machine.token == pytest.approx(rooms * room, rel=0.15)


def test_nobody_waits_where_nobody_runs_or_no_limit_is_set() -> None:
    assert Pace(2.0).grant(KINDS, 0) is None
    assert Pace().grant(KINDS, 5) is None
    assert Pace(2.0).grant((), 5) is None


def test_one_slow_step_moves_nothing() -> None:
    machine = Machine(Pace(2.5), token=0.5)
    machine.step(4, 0, slow=20.0)
    for _ in range(30):
        before, _ = machine.granted_step(4)
    machine.step(4, before, slow=20.0)
    machine.step(4, 0, slow=20.0)
    after, _ = machine.granted_step(4)
    assert before > LEAST
    assert after == pytest.approx(before, rel=0.1)


def test_a_grant_is_at_most_twice_the_last_one() -> None:
    machine = Machine(Pace(2.0), token=0.01)
    machine.step(0, 500)
    grants = [machine.granted_step(2)[0] for _ in range(20)][2:]
    assert grants[0] == LEAST
    assert all(after <= 2 * before for before, after in itertools.pairwise(grants))
    assert grants[-1] > 1000


def test_prompts_go_on_at_any_price() -> None:
    machine = Machine(Pace(1.5), token=50.0)
    machine.step(0, 100)
    assert [machine.granted_step(1)[0] for _ in range(10)] == [0, 0] + 8 * [LEAST]


def test_a_larger_batch_is_not_held_to_the_steps_of_a_small_one() -> None:
    machine = Machine(Pace(2.0), token=0.5)
    machine.step(0, 50)
    small = [machine.granted_step(1)[0] for _ in range(20)][-1]
    large = [machine.granted_step(32)[0] for _ in range(20)]
    assert large[:2] == [0, 0]
    assert large[-1] > 2 * small


def test_a_batch_size_that_was_not_seen_for_long_is_looked_at_again() -> None:
    machine = Machine(Pace(2.0), token=0.5)
    grants = [machine.granted_step(3)[0] for _ in range(600)]
    assert 3 <= grants.count(0) <= 5


def test_a_kind_of_work_that_was_never_seen_begins_with_the_least() -> None:
    machine = Machine(Pace(2.0), token=0.01)
    machine.step(0, 500)
    for _ in range(3):
        machine.granted_step(2)
    assert machine.pace.grant(KINDS, 2) > LEAST  # type: ignore[operator]
    assert machine.pace.grant((("alpha", True),), 2) == LEAST

"""When a batch drafts and when it is read."""

from __future__ import annotations

import pytest

from ensemble_core.decoding.rhythm import LONGEST, Beat, Prospect, Rhythm, _Ways


def taught(main: tuple[float, float], assistant: tuple[float, float], batch: int, num_steps: int = 40) -> Rhythm:
    """A rhythm that has seen steps of these costs: (fixed, per token), in seconds."""
    rhythm = Rhythm()
    for _ in range(num_steps):
        for count in (batch, 2 * batch, 4 * batch):
            rhythm.record(count, 0, main[0] + main[1] * count, 0)
            rhythm.record(0, count, assistant[0] + assistant[1] * count, count // 2)
    return rhythm


def drafted(rhythm: Rhythm, batch: int, survival: float) -> int:
    """How many tokens are drafted before they are read."""
    likely = 1.0
    for length in range(LONGEST):
        prospect = Prospect(batch * length // batch, likely=likely, survival=survival, due=False)
        if rhythm.beat([prospect] * batch).read:
            return length
        likely *= survival
    return LONGEST


def test_nothing_to_read_is_never_read() -> None:
    beat = Rhythm().beat([Prospect(0), Prospect(0)])
    assert beat.draft
    assert not beat.read


def test_what_is_due_is_read_at_once() -> None:
    rhythm = taught((1.0, 0.01), (1.0, 0.01), 4)
    assert rhythm.beat([Prospect(2, due=True), Prospect(2), Prospect(2), Prospect(2)]).read


def test_a_complete_draft_is_not_followed() -> None:
    beat = taught((1.0, 0.01), (1.0, 0.01), 1).beat([Prospect(3, due=True, complete=True)])
    assert beat.read
    assert not beat.drafts(Prospect(3, due=True, complete=True))


def test_a_given_length_is_kept_whatever_it_costs() -> None:
    rhythm = taught((100.0, 1.0), (0.01, 0.0), 1)
    beat = rhythm.beat([Prospect(3, likely=0.01, survival=0.1, eager=True, free=False)])
    assert beat.draft
    assert not beat.read


def test_certain_drafts_are_longer() -> None:
    lengths = [drafted(taught((1.0, 0.01), (1.0, 0.01), 1), 1, survival) for survival in (0.3, 0.7, 0.98)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_dear_readings_are_rarer() -> None:
    cheap = drafted(taught((1.0, 0.01), (0.1, 0.01), 1), 1, 0.8)
    dear = drafted(taught((1.0, 0.01), (5.0, 0.01), 1), 1, 0.8)
    assert cheap < dear


@pytest.mark.parametrize("idle", [True, False])
def test_assistants_read_along_where_it_costs_nothing(idle: bool) -> None:
    """On a device of their own they read while main drafts; on main's they wait until it pays."""
    rhythm = taught((1.0, 0.01), (1.0, 0.01), 4)
    for _ in range(20):
        rhythm.record(4, 8, 1.05 if idle else 2.1, 0)
    beat = rhythm.beat([Prospect(2, likely=0.97, survival=0.97)] * 4)
    assert beat.draft
    assert beat.read is idle


def test_guesses_are_fed_as_long_as_they_pay() -> None:
    prospect = Prospect(0, num_guessed=7, guess=0.5)
    assert Beat(price=0.2).guesses(prospect) == 2
    assert Beat(price=0.6).guesses(prospect) == 0
    assert Beat(price=0.0).guesses(prospect) == 7
    assert Beat(price=0.2).gain(prospect) == pytest.approx(1 + 0.5 + 0.25)


def shares(draft: float, together: float, steps: int = 3000) -> float:
    """The share of steps together, where both ways have these rates."""
    ways, num, step = _Ways(), 0, 0
    for _ in range(steps):
        ways.choose(draft, together)
        num += ways.together
        step = 0 if ways.together else step + 1
        ends = ways.together or step % 3 == 0
        ways.add(8 if ways.together else 24 * ends, 8 / (together if ways.together else draft), ends)
    return num / steps


def test_the_faster_way_is_kept_and_the_other_seldom_tried() -> None:
    assert shares(100.0, 80.0) < 0.05
    assert shares(80.0, 100.0) > 0.9
    assert shares(100.0, 99.0) < 0.5


def test_a_way_that_has_become_slower_is_left() -> None:
    ways = _Ways()
    rates = {False: 100.0, True: 60.0}
    taken = []
    for number in range(4000):
        if number == 1000:
            rates = {False: 40.0, True: 60.0}
        ways.choose(rates[False], rates[True])
        ways.add(8, 8 / rates[ways.together], True)
        taken.append(ways.together)
    assert sum(taken[:1000]) < 60
    assert sum(taken[1300:]) > 2400


def steps_together(fixed: float, per_token: float, survival: float) -> bool:
    """Whether 32 sequences end up stepping together, where a forward costs `fixed` and so much a token."""
    rhythm, length = Rhythm(), 0
    for _ in range(400):
        prospects = [Prospect(length, likely=survival ** max(length - 1, 0), survival=survival)] * 32
        beat = rhythm.beat(prospects)
        if beat == Beat():
            return True
        fed, read = 32 * beat.draft, 32 * length * beat.read
        final = int(32 * sum(survival**k for k in range(length))) if read else 0
        cost = (fixed + per_token * fed) * (fed > 0) + (fixed + per_token * read) * (read > 0)
        rhythm.record(fed, read, cost, final)
        length = int(beat.draft) if beat.read else length + 1
    return False


def test_all_step_together_where_rows_are_all_that_costs() -> None:
    """Then a wrong draft costs as much as a right one saves."""
    assert steps_together(0.0, 0.001, 0.3)
    assert not steps_together(0.1, 0.0001, 0.9)


def test_a_batch_with_a_given_length_never_steps_together() -> None:
    rhythm = Rhythm()
    prospects = [Prospect(2, likely=0.3, survival=0.3, free=False)] * 32
    for _ in range(200):
        beat = rhythm.beat(prospects)
        assert beat != Beat()
        rhythm.record(32 * beat.draft, 64 * beat.read, 0.1, 20 * beat.read)

"""How often drafted tokens stay."""

from __future__ import annotations

from itertools import pairwise

from ensemble_core.decoding.habits import Habits, Verdict


def test_more_certain_tokens_are_expected_to_stay_more_often() -> None:
    for kind in ("greedy", "sampled"):
        known = Habits(kind=kind)  # type: ignore[arg-type]
        levels = [known.survival(i / 20) for i in range(21)]
        assert all(low <= high for low, high in pairwise(levels))
        assert 0 < levels[0] < levels[-1] < 1


def test_verdicts_move_their_class_alone() -> None:
    known = Habits()
    before = known.survival(0.95)
    for _ in range(50):
        known.learn(Verdict(0.02, False))
    assert known.survival(0.01) < 0.1
    assert known.survival(0.95) == before


def test_a_text_begins_with_what_others_taught_and_teaches_them() -> None:
    parent = Habits()
    first, second = Habits(parent), Habits(parent)
    for _ in range(100):
        first.learn(Verdict(0.3, False))
    assert first.survival(0.3) < second.survival(0.3) < Habits().survival(0.3)
    assert second.average == parent.average < 0.5


def test_the_past_fades() -> None:
    known = Habits()
    for kept in (False, True):
        for _ in range(2000):
            known.learn(Verdict(0.6, kept))
    assert known.survival(0.6) > 0.9

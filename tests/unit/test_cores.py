"""How cores are shared out among members that step together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_core.members.cores import Cores, ForwardCost, Team, share_out

COSTS = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.001, 1000.0), min_size=1)


@given(COSTS, st.integers(1, 16))
def test_every_member_has_a_team_and_every_core_one_owner(costs: dict[str, float], cores: int) -> None:
    teams = share_out(costs, cores)
    assert sorted(name for team in teams for name in team.members) == sorted(costs)
    assert all(team.cores >= 1 for team in teams)
    assert sum(team.cores for team in teams) == cores


@given(COSTS, st.integers(1, 16))
def test_no_core_would_be_of_more_use_elsewhere(costs: dict[str, float], cores: int) -> None:
    teams = [team for team in share_out(costs, cores) if len(costs) <= cores]
    for giver in teams:
        for taker in teams:
            if giver.cores > 1 and giver is not taker:
                slowest = max(work(giver, costs, 0), work(taker, costs, 0))
                assert max(work(giver, costs, -1), work(taker, costs, 1)) >= slowest * (1 - 1e-9)


def work(team: Team, costs: dict[str, float], more: int) -> float:
    return sum(costs[name] for name in team.members) / (team.cores + more)


@pytest.mark.parametrize(
    ("costs", "cores", "teams"),
    [
        ({"small": 20.0, "large": 26.0}, 2, {("large",): 1, ("small",): 1}),
        ({"small": 10.0, "large": 30.0}, 8, {("large",): 6, ("small",): 2}),
        ({"small": 20.0}, 8, {("small",): 8}),
        ({"a": 9.0, "b": 5.0, "c": 4.0}, 2, {("a",): 1, ("b", "c"): 1}),
    ],
)
def test_more_cores_where_more_is_to_be_done(
    costs: dict[str, float], cores: int, teams: dict[tuple[str, ...], int]
) -> None:
    assert {team.members: team.cores for team in share_out(costs, cores)} == teams


def test_on_one_core_members_work_in_turn() -> None:
    assert Cores().teams({"a": 1.0, "b": 2.0}) == (Team(("a", "b"), 0),)
    assert Cores().teams({}) == ()


def test_who_steps_alone_has_all_cores() -> None:
    assert Cores(4).teams({"a": 1.0}) == (Team(("a",), 4),)
    assert Cores(4).teams({}) == ()


def test_the_longest_comes_last() -> None:
    assert [team.members for team in share_out({"a": 3.0, "b": 1.0, "c": 2.0}, 3)] == [("b",), ("c",), ("a",)]


def test_a_forward_costs_what_it_is_fed_and_asked() -> None:
    assert ForwardCost(10.0, 2.0, 0.5)(3, 4) == 18.0

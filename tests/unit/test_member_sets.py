"""Sets of members against Python's own sets, for more members than an octet holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ensemble_core.fusion.member_sets import MemberSets

ROWS, PLACES = 3, 11
SIZES = [1, 2, 7, 8, 9, 17]


def flags_of(num_members: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_members)
    return [torch.rand(ROWS, PLACES, generator=generator) < 0.5 for _ in range(num_members)]


def members_at(flags: list[Tensor], row: int, place: int) -> set[int]:
    return {member for member, flag in enumerate(flags) if flag[row, place]}


@pytest.mark.parametrize("num_members", SIZES)
def test_sums_and_counts_are_those_of_the_sets(num_members: int) -> None:
    flags = flags_of(num_members)
    sets = MemberSets.of_flags(flags)
    numbers = torch.rand(ROWS, num_members, generator=torch.Generator().manual_seed(1)) ** 8
    sums, counts = sets.sums(numbers), sets.counts()
    for row in range(ROWS):
        for place in range(PLACES):
            expected = sum(numbers[row, member].double().item() for member in members_at(flags, row, place))
            assert sums[row, place].item() == pytest.approx(expected, rel=1e-6, abs=0.0)
    assert counts.tolist() == torch.stack(flags, dim=1).sum(dim=2).tolist()


@pytest.mark.parametrize("num_members", SIZES)
def test_questions_are_answered_as_the_sets_would(num_members: int) -> None:
    flags, others = flags_of(num_members), flags_of(num_members + 40)[:num_members]
    sets = MemberSets.of_flags(flags)
    less = sets.without(MemberSets.of_flags(others)).where(flags[0])
    chosen = torch.stack(others, dim=1)[:, :, 0]
    met = sets.meets(chosen)
    places = torch.tensor([[4, 0, 4], [10, 1, 2], [3, 3, 9]])
    for row in range(ROWS):
        for place in range(PLACES):
            here = members_at(flags, row, place)
            left = here - members_at(others, row, place) if flags[0][row, place] else set()
            assert {m for m in range(num_members) if less.has(m)[row, place]} == left
            assert bool(met[row, place]) == bool(here & {m for m in range(num_members) if chosen[row, m]})
        for column, place in enumerate(places[row].tolist()):
            found = {m for m in range(num_members) if sets.at(places).has(m)[row, column]}
            assert found == members_at(flags, row, place)


@pytest.mark.parametrize("num_members", SIZES)
def test_places_may_repeat_and_be_none(num_members: int) -> None:
    generator = torch.Generator().manual_seed(num_members)
    places = [torch.randint(0, PLACES + 1, (ROWS, 6), generator=generator) for _ in range(num_members)]
    sets = MemberSets.of_places(places, PLACES)
    for member, own in enumerate(places):
        for row in range(ROWS):
            assert set(sets.has(member)[row].nonzero().flatten().tolist()) == set(own[row].tolist()) - {PLACES}


def test_one_row_of_sets_serves_every_row() -> None:
    flags = [flag[:1] for flag in flags_of(9)]
    places = torch.tensor([[0, 5], [7, 7]])
    assert torch.equal(MemberSets.of_flags(flags).at(places).has(8), flags[8][0][places])

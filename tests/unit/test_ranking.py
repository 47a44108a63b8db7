"""The order of tokens against Python's sort by (-number, id)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_core.members.ranking import BESIDE, STRIPE, has_stripes, peaks, ranked, within_reach

BLOCK = STRIPE * BESIDE


def slow(numbers: Tensor, num: int, token_ids: list[int] | None = None) -> list[int]:
    """Places of one row; NaN comes first."""
    row = [math.inf if math.isnan(number) else number for number in numbers.tolist()]
    ids = token_ids or list(range(len(row)))
    return sorted(range(len(row)), key=lambda place: (-row[place], ids[place]))[:num]


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, -1.5, 3e-38, -3e-38, 1e-45, -1e-45, -math.inf, math.nan, -3e38, 3e38])


@given(st.lists(few, min_size=1, max_size=40), st.integers(1, 50), st.randoms(use_true_random=False))
def test_likelier_first_of_equals_the_lowest_id(numbers: list[float], num: int, random: object) -> None:
    row = torch.tensor(numbers)
    ids = list(range(0, 7 * len(numbers), 7))
    random.shuffle(ids)  # type: ignore[attr-defined]
    assert ranked(row, num).tolist() == slow(row, num)
    assert ranked(row, num, torch.tensor(ids)).tolist() == slow(row, num, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [5 * BLOCK, 9 * BLOCK - 1, 9 * BLOCK + 1, 20_000])
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 17, 300]), st.integers(1, 200))
def test_long_rows_with_many_equals(dtype: torch.dtype, width: int, seed: int, values: int, num: int) -> None:
    """In rows of one to 300 different numbers, through stripes and without, in any order of ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-values, 0, (3, width), generator=generator).to(dtype) / 8
    rows[1, torch.randint(0, width, (num,), generator=generator)] = 1.0
    rows[2, width - num :] = 1.0
    expected = rows.sort(dim=1, descending=True, stable=True).indices[:, :num]
    assert torch.equal(ranked(rows, num), expected)
    ids = torch.stack([torch.randperm(width, generator=generator) for _ in rows])
    assert torch.equal(ids.gather(1, ranked(rows.gather(1, ids), num, ids)), expected)


def test_a_batch_of_more_dimensions() -> None:
    rows = torch.randint(0, 9, (2, 3, 6000), generator=torch.Generator().manual_seed(0)).float()
    assert has_stripes(6000, 5)
    expected = rows.sort(dim=2, descending=True, stable=True).indices[:, :, :5]
    assert torch.equal(ranked(rows, 5), expected)
    assert torch.equal(ranked(rows, 5, torch.arange(6000).expand(2, 3, 6000)), expected)
    assert ranked(rows[:0], 5).shape == (0, 3, 5)


def test_one_row_whose_ids_do_not_rise_is_seen() -> None:
    rows = torch.zeros(2, 6000)
    ids = torch.arange(6000).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    assert ids.gather(1, ranked(rows, 4, ids)).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("lane", [0, 1, BESIDE - 2, BESIDE - 1])
def test_any_stripe_of_the_last_block_may_hold_the_lowest_id(lane: int) -> None:
    """All stripes of a block have the same peak; that of one is at the block's start, that of others at its end."""
    num, width = 70, 20 * BLOCK + 5
    row = torch.full((width,), -9.0)
    row[15 * BLOCK : 16 * BLOCK : BESIDE + 1] = 2.0
    row[16 * BLOCK : 16 * BLOCK + num - 1 - 16] = 2.0
    row[4 * BLOCK - BESIDE : 4 * BLOCK] = 1.0
    row[4 * BLOCK - BESIDE + lane] = -9.0
    row[3 * BLOCK + lane] = 1.0
    row[-5:] = 1.0
    assert has_stripes(width, num)
    for n in (1, num - 1, num, num + 10):
        assert ranked(row, n).tolist() == slow(row, n)


def test_stripes_are_few_of_the_places() -> None:
    """Which is what they are for: 256 of 262,144 are searched in 5,104."""
    rows = torch.randn(2, 262_144, generator=torch.Generator().manual_seed(1))
    tops = peaks(rows)
    assert tops.shape == (2, 262_144 // STRIPE)
    assert torch.equal(tops.amax(dim=1), rows.amax(dim=1))
    places = within_reach(tops, 256, 262_144)
    assert places.shape == (2, (256 + BESIDE - 1) * STRIPE)
    for row, expected in zip(places.tolist(), rows.topk(256, dim=1).indices.tolist(), strict=True):
        assert len(set(row)) == len(row)
        assert set(expected) <= set(row)

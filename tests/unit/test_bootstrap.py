"""Intervals against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ensemble_core.evaluation.bootstrap import Ratio, draws, interval, paired_interval


def ratio(numerators: Tensor, denominators: Tensor | None = None) -> Ratio:
    return Ratio(
        numerators.double(), (torch.ones_like(numerators) if denominators is None else denominators).double()
    )


def test_a_draw_holds_as_many_documents_as_there_are() -> None:
    counts = draws(17, num_draws=50)
    assert counts.shape == (50, 17)
    assert counts.sum(dim=1).eq(17).all()
    assert torch.equal(counts, draws(17, num_draws=50))
    assert not torch.equal(counts, draws(17, seed=1, num_draws=50))


def test_an_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = interval(ratio(values), draws(400))
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    mean = float(values.mean())
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(mean + half, abs=0.15 * half)


def test_a_constant_has_no_width() -> None:
    sizes = torch.arange(1.0, 30.0)
    found = interval(ratio(3 * sizes, sizes), draws(29))
    assert (found.low, found.value, found.high) == pytest.approx((3, 3, 3))


def test_pairs_cancel_what_documents_have_in_common() -> None:
    hard = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 10
    counts = draws(100)
    paired = paired_interval(ratio(hard - 0.5), ratio(hard), counts)
    assert (paired.low, paired.value, paired.high) == pytest.approx((-0.5, -0.5, -0.5))
    assert interval(ratio(hard), counts).high - interval(ratio(hard), counts).low > 1


def test_ratios_are_of_sums_not_means_of_ratios() -> None:
    found = ratio(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))
    assert found.value == 2.5
    assert found.drawn(torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)).tolist() == [1.0, 2.5]

"""Linear pools: shares from a few fusions, and the best weights against a plain grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ensemble_core.evaluation.mixture import fit_mixture, linear_shares
from ensemble_core.evaluation.weights import Weights, minimise


def shares_of(num: int, members: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3.0 * torch.randn(num, members, generator=generator, dtype=torch.float64)).sigmoid()


def nats(shares: Tensor, weights: Weights) -> float:
    return -float((shares @ torch.tensor(weights, dtype=torch.float64)).log().mean())


def grid(members: int, parts: int) -> list[Weights]:
    steps = itertools.product(range(parts + 1), repeat=members - 1)
    return [(*(s / parts for s in step), 1 - sum(step) / parts) for step in steps if sum(step) <= parts]


@pytest.mark.parametrize(("members", "parts"), [(2, 200), (3, 50), (4, 20)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_both_searches_reach_the_best_of_a_plain_grid(members: int, parts: int, seed: int) -> None:
    shares = shares_of(300, members, seed)
    shares[:, -1] *= 0.2  # one is of little use
    best = min(nats(shares, weights) for weights in grid(members, parts))
    fitted = fit_mixture(shares)
    searched = minimise(lambda weights: nats(shares, weights), (1.0,) * members)
    assert sum(fitted) == pytest.approx(1.0)
    assert nats(shares, fitted) <= best + 1e-4
    assert nats(shares, searched) <= best + 1e-3


def test_a_coarse_look_may_be_at_other_positions() -> None:
    shares = shares_of(800, 2, 4)
    calls: list[Weights] = []

    def value(weights: Weights) -> float:
        calls.append(weights)
        return nats(shares, weights)

    found = minimise(value, (0.9, 0.1), screen=lambda weights: nats(shares[::8], weights))
    assert value(found) <= min(nats(shares, weights) for weights in grid(2, 200)) + 1e-4
    assert len(calls) < 12


def test_shares_follow_from_what_is_linear() -> None:
    shares = shares_of(50, 3, 5)
    calls: list[Weights] = []

    def pool(weights: Weights) -> Tensor:
        calls.append(weights)
        return shares @ torch.tensor(weights, dtype=torch.float64)

    found = linear_shares(pool, 3)
    assert found is not None
    torch.testing.assert_close(found, shares)
    assert len(calls) == 4
    assert all(min(weights) > 0 for weights in calls), "a member without weight may be left out of a support"


def test_what_is_not_linear_is_told_apart() -> None:
    shares = shares_of(50, 2, 6)

    def geometric(weights: Weights) -> Tensor:
        return (shares.log() @ torch.tensor(weights, dtype=torch.float64)).exp()

    assert linear_shares(geometric, 2) is None


def test_positions_that_nobody_explains_do_not_matter() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.0, 0.0], [0.1, 0.9]], dtype=torch.float64)
    assert fit_mixture(shares) == pytest.approx((0.5, 0.5))

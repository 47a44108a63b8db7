"""Adapted layers: W x + B A x for merged projections, whichever of them has an adapter, in every kind of product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ensemble_core.members.body.linear import Linear
from ensemble_core.members.body.low_rank import AdaptedLinear, LowRank, side_by_side
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.kernels.plain import PLAIN

SIZES = (128, 64, 64)


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype) / shape[-1] ** 0.5


def parts_of(ranks: tuple[int | None, ...], dtype: torch.dtype) -> list[LowRank | None]:
    return [
        None
        if rank is None
        else LowRank(random(rank, 96, seed=i, dtype=dtype), random(size, rank, seed=9 + i, dtype=dtype))
        for i, (rank, size) in enumerate(zip(ranks, SIZES, strict=True))
    ]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (None, 7, None), (3, None, 70), (64, 64, 64)])
@pytest.mark.parametrize("num", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_each_projection_gets_its_own_adapter(
    ranks: tuple[int | None, ...], num: int, dtype: torch.dtype, compiled: bool
) -> None:
    kernels = choose([torch.device("cpu")], dtype) if compiled else PLAIN
    weight, x = random(sum(SIZES), 96, seed=1, dtype=dtype), random(num, 96, seed=2, dtype=dtype)
    parts = parts_of(ranks, dtype)
    layer = AdaptedLinear(Linear(weight, None, kernels), side_by_side(parts, SIZES), kernels)
    expected = [
        x.double() @ own.double().T
        + (0 if part is None else x.double() @ part.down.double().T @ part.up.double().T)
        for own, part in zip(weight.split(SIZES), parts, strict=True)
    ]
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    torch.testing.assert_close(layer(x).double(), torch.cat(expected, dim=1), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steady_layer_answers_a_row_the_same_in_any_crowd(dtype: torch.dtype) -> None:
    kernels = choose([torch.device("cpu")], dtype)
    x = random(70, 96, seed=2, dtype=dtype)
    base = Linear(random(sum(SIZES), 96, seed=1, dtype=dtype), None, kernels)
    layer = AdaptedLinear(base, side_by_side(parts_of((4, None, 9), dtype), SIZES), kernels)
    assert layer.make_steady()
    together = layer(x)
    for num in (1, 3, 40):
        assert torch.equal(layer(x[-num:]), together[-num:])


def test_the_base_layer_is_not_changed() -> None:
    base = Linear(random(sum(SIZES), 96, seed=1, dtype=torch.float32), None, PLAIN)
    x = random(3, 96, seed=2, dtype=torch.float32)
    before = base(x)
    layer = AdaptedLinear(base, side_by_side(parts_of((4, 4, 4), torch.float32), SIZES), PLAIN)
    assert not torch.equal(layer(x), before)
    assert torch.equal(base(x), before)

"""Compiled arithmetic between products against torch's, and both against plain float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from ensemble_core.members.kernels.base import Kernels, Norm
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.kernels.compiled.kernels import CompiledKernels
from ensemble_core.members.kernels.plain import PlainKernels

CPU = torch.device("cpu")
WAYS = [PlainKernels(), CompiledKernels()]
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(weight: Tensor) -> Norm:
    return Norm(weight, 1e-5)


def plain(x: Tensor, by: Norm) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + by.epsilon).sqrt() * by.weight.double()


def gelu_tanh(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (5, 33), (40, 640)])
@pytest.mark.parametrize("gemma", [False, True])
def test_sums_and_their_norms(way: Kernels, rows: int, width: int, dtype: torch.dtype, gemma: bool) -> None:
    x, change = (3.0 * random(rows, width, seed=seed, dtype=dtype) for seed in (1, 2))
    after = norm(random(width, seed=3)) if gemma else None
    before = Norm(random(width, seed=4), 1e-2)
    total, normed = way.add_and_norm(x, change, after, before)
    expected = x.double() + (change.double() if after is None else plain(change, after))
    torch.testing.assert_close(total.double(), expected, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    torch.testing.assert_close(normed.double(), plain(total, before), atol=BOUNDS[dtype], rtol=BOUNDS[dtype])
    assert total.dtype is normed.dtype is dtype


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [silu, gelu_tanh, relu, gelu])
def test_gates(way: Kernels, activation: object, dtype: torch.dtype) -> None:
    """Those that are compiled and any other; far from zero, too."""
    gate_up = 20.0 * random(7, 66, dtype=dtype)
    gate_up[0, :4] = torch.tensor([-500.0, 500.0, 0.0, -0.0])
    found = way.gate(gate_up, activation)  # type: ignore[arg-type]
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = activation(gate) * up  # type: ignore[operator]
    # float32 of 20 to 500: what torch itself loses against float64 reaches 1.3e-5.
    torch.testing.assert_close(found.double(), expected, atol=20 * BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_rotations(way: Kernels, with_norm: bool, dtype: torch.dtype) -> None:
    heads, num, size = random(9, 5, 16, dtype=dtype), 4, 16
    angles = random(9, 1, size // 2, seed=5).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    signed = torch.cat((-sin[..., : size // 2], sin[..., size // 2 :]), dim=-1)
    by = norm(random(num, size, seed=6)) if with_norm else None
    found = way.turn(heads, num, by, cos.to(dtype), signed.to(dtype))
    x = heads[:, :num].double() if by is None else plain(heads[:, :num], by)
    half = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
    expected = x * cos.double() + half * sin.double()
    torch.testing.assert_close(found.double(), expected, atol=2 * BOUNDS[dtype], rtol=2 * BOUNDS[dtype])


def test_rows_do_not_depend_on_each_other_and_nan_comes_through() -> None:
    x, change, weight = random(6, 48, seed=1), random(6, 48, seed=2), norm(random(48, seed=3))
    way = CompiledKernels()
    total, normed = way.add_and_norm(x, change, weight, weight)
    alone = way.add_and_norm(x[4:5], change[4:5], weight, weight)
    assert torch.equal(alone[0][0], total[4])
    assert torch.equal(alone[1][0], normed[4])
    x[2, 7] = torch.nan
    broken = way.add_and_norm(x, change, weight, weight)
    assert broken[1][2].isnan().all()
    assert torch.equal(broken[1][3], normed[3])
    gates = random(3, 8)
    gates[1, 2] = torch.nan
    assert way.gate(gates, silu).isnan().nonzero().tolist() == [[1, 2]]


def test_what_serves_where() -> None:
    assert isinstance(choose([CPU], torch.bfloat16), CompiledKernels)
    assert isinstance(choose([CPU], torch.float16), PlainKernels)
    assert isinstance(choose([torch.device("meta")], torch.float32), PlainKernels)

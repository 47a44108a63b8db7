"""Linear layers against torch's, and rows that do not depend on each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensemble_core.members.body.linear import Head, Linear, merged
from ensemble_core.members.kernels.base import Kernels
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.kernels.plain import PLAIN

SHAPES = [
    (3, 5),
    (96, 64),
    (53, 37),
    (64, 2048),
    (33, 1537),
    (192, 1022),
    (576, 640),
]  # (out, in); long sums are split where a row is alone


def kernels_of(dtype: torch.dtype) -> Kernels:
    return choose([torch.device("cpu")], dtype)


def layer(
    shape: tuple[int, int], dtype: torch.dtype, bias: bool, steady: bool
) -> tuple[Linear, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=random).to(dtype)
    added = torch.randn(shape[0], generator=random).to(dtype) if bias else None
    made = Linear(weight, added, kernels_of(dtype))
    assert not steady or made.make_steady()
    return made, weight, added


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(shape: tuple[int, int], dtype: torch.dtype, bias: bool, steady: bool) -> None:
    made, weight, added = layer(shape, dtype, bias, steady)
    for num in (1, 2, 7, 33, 64, 65, 200):
        x = torch.randn(num, shape[1]).to(dtype)
        expected = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
        bound = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}[dtype] * shape[1] ** 0.5
        torch.testing.assert_close(made(x).double(), expected, atol=bound, rtol=1e-2)
        assert made(x).dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_a_steady_layer_is_the_same_whatever_stands_beside_it(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit: alone, and at any place among any number of others, ones that are not finite included."""
    made, *_ = layer(shape, dtype, False, True)
    x = torch.randn(150, shape[1]).to(dtype)
    alone = torch.cat([made(x[i : i + 1]) for i in range(len(x))])
    for num in (*range(1, 40), 63, 64, 65, 100, 129, 150):
        assert torch.equal(made(x[:num]), alone[:num])
        assert torch.equal(made(x[-num:]), alone[-num:])
    x[::2] = torch.nan
    assert torch.equal(made(x)[1::2], alone[1::2])
    assert made(x)[::2].isnan().all()


def test_merged_layers_give_their_outputs_side_by_side() -> None:
    layers = [nn.Linear(8, 3), nn.Linear(8, 5)]
    x = torch.randn(4, 8)
    expected = torch.cat([each(x) for each in layers], dim=1)
    torch.testing.assert_close(merged(*layers, kernels=PLAIN)(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (4096, 640), (640, 2048), (3, 5)])
def test_how_many_threads_there_are_changes_no_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Members share cores as their neighbours leave them, so an answer must not depend on it."""
    made, *_ = layer(shape, dtype, False, False)
    before = torch.get_num_threads()
    try:
        for num in (1, 2, 5, 8, 32, 100, 300):
            x = torch.randn(num, shape[1]).to(dtype)
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(made(x))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_product_is_the_library_s(bias: bool) -> None:
    """Both sum in float32 and round once; one unit in the last place of bfloat16 may differ."""
    random = torch.Generator().manual_seed(1)
    weight, added = (
        torch.randn(320, 576, generator=random).bfloat16(),
        torch.randn(320, generator=random).bfloat16(),
    )
    own = Linear(weight, added if bias else None, kernels_of(torch.bfloat16))
    library = Linear(weight, added if bias else None, PLAIN)
    if own.compiled is None:
        pytest.skip("this processor does not multiply pairs of bfloat16")
    for num in (*range(1, 14), 47, 48, 49, 97, 500):
        x = torch.randn(num, 576, generator=random).bfloat16()
        torch.testing.assert_close(own(x), library(x), atol=0.26, rtol=2**-7)
        assert (own(x) != library(x)).float().mean() < 0.02


@pytest.mark.parametrize("kernels", [PLAIN, kernels_of(torch.bfloat16)], ids=["library", "compiled"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_head_in_parts_is_the_layer(bias: bool, kernels: Kernels) -> None:
    """Of more outputs than one part has, to the bit where there is one row and where there are many."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(150_016, 16, generator=random).bfloat16()
    added = torch.randn(150_016, generator=random).bfloat16() if bias else None
    head, whole = Head(weight, added, kernels), Linear(weight, added, kernels)
    assert [part.num_bytes for part in head.parts] != [whole.num_bytes]
    assert sum(part.num_bytes for part in head.parts) == whole.num_bytes
    for num in (1, 7, 33):
        x = torch.randn(num, 16, generator=random).bfloat16()
        assert torch.equal(head(x), whole(x))

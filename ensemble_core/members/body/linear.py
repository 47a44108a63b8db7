"""Linear layers as a decode step reads them fastest: siblings merged, weights reordered once.

A decode step is bound by reading weights. Projections of one input (query, key and value; gate and up) become one
matrix, so that a layer reads its weights in fewer and longer runs. Where there is a compiled product, it packs the
matrix as it reads it; elsewhere on CPU a matrix is kept in the blocked layout of oneDNN, so that a call neither
strides through it nor reorders it. Each output is the same sum of the same products.

A compiled product sums a row in one order, whatever other rows there are. In which order a library sums depends on
how many rows it is given: on CPU oneDNN splits long sums where there is one row alone. A layer that is made steady
calls it with a few numbers of rows that agree bit for bit, so that a row comes out the same whatever stands beside
it.

Knows weights and biases; does not know models, caches or tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ensemble_core.members.kernels.base import Kernels, Product
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.members.threads import grow

_TILE = 64  # rows that a steady layer takes at once; more are not faster
_COUNTS = (1, 2, 4, *range(8, 32, 4), *range(32, _TILE + 1, 8))  # of rows that it may be called with
_PROBED = 256  # outputs of a probe that differ; more are repeated
_OUTPUTS = 65_536  # of a part of a head
_BATCH = 32  # rows that the blocked layout is chosen for; any number is served, nearly as well


class Linear:
    """y = x W^T + b. weight: (out, in), packed for a compiled product or blocked for the library, if that serves.

    copied: whether the weight was reordered, so that the original is not held here. counts: numbers of rows that the
    library is called with, rising; none: any.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        self.compiled, self._shape = kernels.product(weight), (weight.shape[0], weight.shape[1])
        self._multiply: Product = self.compiled or _LibraryProduct(weight)
        self.weight, self.bias = self._multiply.weight, bias
        self.copied = self.weight is not weight
        self.num_bytes = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
        self.counts: tuple[int, ...] = ()

    @property
    def num_out(self) -> int:
        """Outputs."""
        return self._shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        if not self.counts or len(x) in self.counts:
            return self._product(x)
        tiles = [self._padded(tile) for tile in torch.split(x, self.counts[-1])]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def make_steady(self) -> bool:
        """Whether each row now comes out the same, bit for bit, whatever other rows there are."""
        if self.compiled is not None:
            return True
        self.counts = _agreeing(self._shape, self.weight.dtype, self.weight.device, self.bias is not None)
        return bool(self.counts)

    def _padded(self, x: Tensor) -> Tensor:
        num = len(x)
        more = self.counts[bisect_left(self.counts, num)] - num
        return self._product(pad(x, (0, 0, 0, more)))[:num] if more else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.bias)


class _LibraryProduct:
    """See `kernels.base.Product`; here rows may depend on their number. weight: blocked if oneDNN serves it."""

    def __init__(self, weight: Tensor) -> None:
        self._blocked = _can_block(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH) if self._blocked else weight

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")  # type: ignore[no-any-return]
        return linear(x, self.weight, bias)


class Head:
    """A layer of many outputs in parts, one after the other, so that cores that come free meanwhile take part.

    The head of a large vocabulary is half of a forward's work, and a product that has begun keeps its threads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> None:
        parts = torch.split(weight, _OUTPUTS) if weight.device.type == "cpu" else (weight,)
        biases = torch.split(bias, [len(part) for part in parts]) if bias is not None else (None,) * len(parts)
        self.parts = [Linear(part, own, kernels) for part, own in zip(parts, biases, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        found = []
        for part in self.parts:
            grow()
            found.append(part(x))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def merged(*layers: nn.Linear, kernels: Kernels) -> Linear:
    """One layer whose output is theirs side by side. Layers with and without bias do not mix."""
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "some of the layers have a bias and some have none"
    weight = layers[0].weight.data if len(layers) == 1 else torch.cat([layer.weight.data for layer in layers])
    return Linear(weight.data, torch.cat(biases) if biases else None, kernels)


def _can_block(weight: Tensor) -> bool:
    """oneDNN serves this type on this processor."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


@lru_cache
def _agreeing(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, has_bias: bool) -> tuple[int, ...]:
    """Numbers of rows for which a layer of this shape sums in the order in which it sums for _TILE; none: no order.

    Tried on products that cancel in pairs, so that what is left of each sum is rounding: another order shows at once,
    in bfloat16 too, where it would change one output in ten thousand otherwise.
    """
    x, weight = _cancelling(shape, dtype, device)
    layer = Linear(weight, torch.zeros_like(weight[:, 0]) if has_bias else None, PLAIN)
    tile = layer(x)
    if not torch.equal(layer(x.flip(0)).flip(0), tile):
        return ()
    found = [n for n in _COUNTS if torch.equal(layer(x[:n]), tile[:n]) and torch.equal(layer(x[-n:]), tile[-n:])]
    return tuple(found)


def _cancelling(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(_TILE, in) inputs and (out, in) weights whose products are the same in pairs but for their sign."""
    num_out, num_in = shape
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(num_in, generator=random)
    one, other = order[: num_in // 2], order[num_in // 2 : num_in // 2 * 2]
    x = torch.randn(_TILE, num_in, generator=random)
    weight = torch.randn(min(num_out, _PROBED), num_in, generator=random)
    x[:, other], weight[:, other] = x[:, one], -weight[:, one]
    weight[:, order[num_in // 2 * 2 :]] = 0.0
    weight = weight.to(device, dtype).repeat(-(-num_out // len(weight)), 1)[:num_out]
    return x.to(device, dtype), weight.contiguous()

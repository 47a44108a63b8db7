"""Linear layers as a decode step reads them fastest: siblings merged, weights reordered once.

A decode step is bound by reading weights. Projections of one input (query, key and value; gate and up) become one
matrix, so that a layer reads its weights in fewer and longer runs; on CPU a matrix is kept in the blocked layout of
oneDNN, so that a call neither strides through it nor reorders it. Each output is the same sum of the same products.

Knows weights and biases; does not know models, caches or tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_BATCH = 32  # rows that the blocked layout is chosen for; any number is served, nearly as well


class Linear:
    """y = x W^T + b. weight: (out, in), in the library's blocked layout where that is faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.blocked = _can_block(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH) if self.blocked else weight
        self.bias = bias
        self.num_bytes = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        if self.blocked:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return linear(x, self.weight, self.bias)


def merged(*layers: nn.Linear) -> Linear:
    """One layer whose output is theirs side by side. Layers with and without bias do not mix."""
    biases = [layer.bias.data for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "some of the layers have a bias and some have none"
    weight = layers[0].weight.data if len(layers) == 1 else torch.cat([layer.weight.data for layer in layers])
    return Linear(weight.data, torch.cat(biases) if biases else None)


def _can_block(weight: Tensor) -> bool:
    """oneDNN serves this type on this processor."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32

"""What members compute beside products of matrices: between a layer's products, over the cache, over logits.

Each operation has a form in torch's operations (`plain`), which serves every device and dtype, and most have one in
compiled loops for CPU (`compiled`), which read each number once and round once. The forms agree up to rounding. Which
one a member uses is decided once, when it is loaded (`choice`). Knows tensors; does not know models or sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


class Norm:
    """RMS norm over the last dimension, computed in float32. weight: (d,) or (heads, d)."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        self.weight, self.epsilon = weight, epsilon  # float32
        self._share = 1.0 / weight.shape[-1]
        self._least = torch.tensor(epsilon, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight, in x's dtype."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        scale = torch.addcmul(self._least, length, length, value=self._share).rsqrt_()
        return torch.mul(x * scale, self.weight, out=torch.empty_like(x))


class Spans(NamedTuple):
    """Which slots of a cache each of N tokens looks at: [begin, end), both (N,). total: slots of all."""

    begin: Tensor  # int64
    end: Tensor  # int64
    total: int


class Chunk(NamedTuple):
    """New tokens of one sequence that follow each other in a row of a cache.

    first_slot: where the row begins. start: position of the first of them.
    """

    first_slot: int
    start: int


# (query (N, H, D), keys and values (slots, Hkv, D), spans, scaling) -> (N, H, D)
SpanAttention = Callable[[Tensor, Tensor, Tensor, Spans, float | None], Tensor]


# (query (T, H, D), keys and values (slots, Hkv, D), chunk, window, scaling) -> (T, H, D)
ChunkAttention = Callable[[Tensor, Tensor, Tensor, Chunk, int | None, float | None], Tensor]


class Survey(NamedTuple):
    """What one reading of logits (N, V) tells.

    normaliser: (N,) float32, log of the sum of exp over columns; NaN for a row that is not finite.
    peaks: (N, stripes), the largest of each stripe; see `ranking`.
    """

    normaliser: Tensor
    peaks: Tensor


class Product(Protocol):
    """x W^T + b for one weight, packed as the loop reads it. A row does not depend, in any bit, on the other rows."""

    weight: Tensor  # packed

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(N, in) and (out,) -> (N, out)."""


class Kernels(Protocol):
    """One form of every operation."""

    def product(self, weight: Tensor) -> Product | None:
        """Products with a weight (out, in); None: there is no loop for it, use a library."""

    @property
    def attend_spans(self) -> SpanAttention | None:
        """Attention of each token over its own span of the cache; None: there is none, attend by groups of rows."""

    def chunk_attention(self, dtype: torch.dtype, sizes: Collection[int]) -> ChunkAttention | None:
        """Attention of a chunk of a prompt for heads of these sizes; None: there is none, attend by groups."""

    def add_and_norm(self, x: Tensor, change: Tensor, after: Norm | None, before: Norm) -> tuple[Tensor, Tensor]:
        """x + change, and its norm by `before`, (N, d) each; `after`, if there is one, norms the change first."""

    def gate(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up, (N, 2 f) -> (N, f)."""

    def turn(self, heads: Tensor, num: int, norm: Norm | None, cos: Tensor, sin: Tensor) -> Tensor:
        """The first `num` of (N, heads, D), normed if there is a norm, and rotated: (N, num, D).

        cos, sin: (N, 1, D); the sine is signed so that the rotated half need not be negated.
        """

    def survey(self, logits: Tensor) -> Survey:
        """Read logits once, (N, V), in as much memory as a few rows."""

    def likeliest(self, logits: Tensor, num: int, found: Survey) -> Tensor:
        """The `num` likeliest ids of each row in the order of `ranking`, (N, V) -> (N, num) int64.

        Rows are long enough for stripes. Logits that give the same float32 log-probability are equals, since no later
        step can tell them apart.
        """

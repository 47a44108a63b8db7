"""Every operation as compiled loops."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ensemble_core.members.kernels.base import ChunkAttention, Product
from ensemble_core.members.kernels.compiled import attention, layers, logits, products, prompts, ranking


class CompiledKernels:
    """See `base.Kernels`."""

    attend_spans = staticmethod(attention.attend_spans)
    add_and_norm = staticmethod(layers.add_and_norm)
    gate = staticmethod(layers.gate)
    turn = staticmethod(layers.turn)
    survey = staticmethod(logits.survey)
    likeliest = staticmethod(ranking.likeliest)

    def product(self, weight: Tensor) -> Product | None:
        """See `Kernels.product`."""
        return products.PackedProduct(weight) if products.serves(weight) else None

    def chunk_attention(self, dtype: torch.dtype, sizes: Collection[int]) -> ChunkAttention | None:
        """See `Kernels.chunk_attention`."""
        return prompts.attend_chunk if prompts.serves(dtype, sizes) else None

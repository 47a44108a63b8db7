"""The best that any direct map can do: a stochastic map from an assistant's tokens to main's, learnt from text by EM.

    p = w p_main + (1 - w) p_assistant T,  T (V_assistant, V_main) with rows that sum to 1

Every direct map with a linear pool is one such T: a token goes to one place, wherever it stands. The likelihood, in
which p is a mixture of V_assistant + 1 parts, rises at each step. Learnt on the very positions that are reported it
bounds all direct maps with a linear pool; learnt on others it is a rival. Knows probabilities alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class LinearMap:
    """T and w. table: (V_assistant, V_main)."""

    table: Tensor
    main_weight: float

    def logprobs(self, own: Tensor, assistant: Tensor, true: Tensor) -> Tensor:
        """log p of P true tokens: own (P,) what main gives them, assistant (P, V_assistant) its distributions."""
        carried = (assistant * self.table.T[true]).sum(dim=1)
        return (self.main_weight * own + (1.0 - self.main_weight) * carried).clamp_min(_TINY).log()


def learn(
    own: Tensor, assistant: Tensor, true: Tensor, size: int, steps: int, smoothing: float = 0.0
) -> LinearMap:
    """Maximum likelihood on P positions; arguments as of `LinearMap.logprobs`, size: V_main.

    smoothing: counts of each row of T that are spread as main's tokens are in the text, so that it serves elsewhere.
    """
    unigram = torch.bincount(true, minlength=size).to(own.dtype)
    unigram = (unigram + 1e-3) / (unigram + 1e-3).sum()
    table, weight = unigram.expand(assistant.shape[1], -1).clone(), 0.5
    for _ in range(steps):
        parts = (1.0 - weight) * assistant * table.T[true]  # (P, V_assistant)
        total = (weight * own + parts.sum(dim=1)).clamp_min(_TINY)
        weight = float((weight * own / total).mean())
        counts = torch.zeros_like(table.T).index_add_(0, true, parts / total.unsqueeze(1)).T
        counts = counts + smoothing * unigram
        table = counts / counts.sum(dim=1, keepdim=True).clamp_min(_TINY)
    return LinearMap(table, weight)

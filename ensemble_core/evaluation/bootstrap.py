"""Bootstrap intervals of ratios of sums over documents (Efron's percentile interval), paired between models.

A metric is a ratio: bits over bytes, right answers over questions. Documents are drawn with replacement. Models are
compared on the same draws, so what makes a document hard for all of them cancels. Knows only numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the 95 % interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Each document's contribution to one metric, float64."""

    numerators: Tensor  # (D,)
    denominators: Tensor  # (D,)

    @property
    def value(self) -> float:
        """The ratio over all documents."""
        return float(self.numerators.sum() / self.denominators.sum())

    def drawn(self, counts: Tensor) -> Tensor:
        """(R,): the ratio in each draw. counts: (R, D), how often each document was drawn."""
        return (counts @ self.numerators) / (counts @ self.denominators)


def draws(num_documents: int, seed: int = 0, num_draws: int = NUM_DRAWS) -> Tensor:
    """(R, D) float64: how often each document occurs in each draw of D documents with replacement."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(num_documents, (num_draws, num_documents), generator=generator)
    counts = torch.zeros(num_draws, num_documents, dtype=torch.float64)
    return counts.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))


def interval(ratio: Ratio, counts: Tensor) -> Interval:
    """A metric with its interval."""
    return _interval(ratio.value, ratio.drawn(counts))


def paired_interval(ratio: Ratio, reference: Ratio, counts: Tensor) -> Interval:
    """A metric minus the reference's, over the same documents."""
    return _interval(ratio.value - reference.value, ratio.drawn(counts) - reference.drawn(counts))


def _interval(value: float, drawn: Tensor) -> Interval:
    edge = (1 - _LEVEL) / 2
    known = drawn[~drawn.isnan()]  # a draw may hold no document that has the metric
    if not len(known):
        return Interval(value, value, value)
    low, high = known.quantile(torch.tensor([edge, 1 - edge], dtype=drawn.dtype)).tolist()
    return Interval(value, low, high)

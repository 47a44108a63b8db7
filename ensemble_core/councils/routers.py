"""How well each of a router's models suits a question, by what was learnt offline.

Knows features and what an artefact holds; does not know requests or how an artefact was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ensemble_core.councils.features import features


@dataclass(frozen=True, slots=True)
class Balance:
    """Quality against price. prices: (M,) of each model."""

    alpha: float
    prices: Tensor

    def of(self, quality: Tensor) -> Tensor:
        """AvengersPro: alpha x (q - min) / (max - min) + (1 - alpha) x (1 - price / max). quality: (..., M)."""
        low, high = quality.amin(-1, keepdim=True), quality.amax(-1, keepdim=True)
        scaled = torch.where(high > low, (quality - low) / (high - low).clamp_min(1e-12), torch.ones_like(quality))
        saving = 1 - self.prices / self.prices.max().clamp_min(1e-12)
        return self.alpha * scaled + (1 - self.alpha) * saving


class Router(Protocol):
    """Scores of all models for a question."""

    def scores(self, question: str, balance: Balance | None) -> Tensor:
        """(M,) float32, in the order of the council's models; the larger the better."""
        ...


@dataclass(frozen=True, slots=True)
class LinearRouter:
    """A ridge head: expected lead over the other models = features x weights + bias. weights: (F, M), bias: (M,).

    preference: (M,) added to the scores by a calibration (RouteLLM, arXiv 2406.18665).
    """

    weights: Tensor
    bias: Tensor
    preference: Tensor | None = None

    def scores(self, question: str, balance: Balance | None) -> Tensor:
        """See `Router`."""
        indices, values = features(question)
        quality = values @ self.weights[indices] + self.bias
        if balance is not None:
            quality = balance.of(quality)
        return quality if self.preference is None else quality + self.preference


@dataclass(frozen=True, slots=True)
class ClusterRouter:
    """Avengers' rule (arXiv 2505.19797): models ranked by their accuracy on the questions near this one.

    centres: (C, F) means of unit vectors; accuracy: (C, M); float32. near: clusters that count; beta: how fast
    farther ones lose weight. preference: as of `LinearRouter`. One that is calibrated compares expected accuracies:
    ranks are often equal, and no threshold can part them.
    """

    centres: Tensor
    accuracy: Tensor
    near: int
    beta: float
    preference: Tensor | None = None

    def scores(self, question: str, balance: Balance | None) -> Tensor:
        """sum over the nearest clusters of p_c / (rank_c + 0.1), p = softmax(-beta d), d_c = 1 - centre . q."""
        indices, values = features(question)
        distance = 1 - self.centres[:, indices] @ values  # (C,)
        nearest = distance.topk(min(self.near, len(distance)), largest=False, sorted=True)
        shares = torch.softmax(-self.beta * nearest.values, 0)
        quality = self.accuracy[nearest.indices]
        if balance is not None:
            quality = balance.of(quality)
        if self.preference is not None:
            return shares @ quality + self.preference
        return shares @ (1 / (ranked(quality) + 0.1))


def ranked(quality: Tensor) -> Tensor:
    """(..., M) float32 ranks from 0, the best first; equal ones share the better rank."""
    better = quality.unsqueeze(-2) > quality.unsqueeze(-1)  # (..., M, M): another is better than this
    return better.sum(-1).to(torch.float32)


def balance_of(models: Sequence[str], alpha: float, prices: Mapping[str, float]) -> Balance:
    """The balance of a council's models in their order."""
    return Balance(alpha, torch.tensor([prices[model] for model in models]))

"""Learns routers from questions and from how well each model answered them.

`fit_linear` is a ridge regression in its dual form, its strength chosen by leave-one-out; `fit_clusters` is Avengers'
K-means (arXiv 2505.19797); `prefer` is RouteLLM's calibration (arXiv 2406.18665). Costs grow with the square of the
number of questions. Invariant: the same data and seed give the same router. Knows no models, tasks or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ensemble_core.councils.features import dense
from ensemble_core.councils.routers import Balance, ClusterRouter, LinearRouter

RIDGES = tuple(10.0**power for power in (-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0))
SEED = 42
NUM_CLUSTERS, NEAR, BETA = 64, 4, 6.0
_ITERATIONS = 1000

Kind = TypeVar("Kind", LinearRouter, ClusterRouter)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a router says of each of its own questions when that question is taken out of what it has learnt.

    parts: (N, P, M) expected qualities, float64; shares: (N, P) how much each part counts.
    """

    parts: Tensor
    shares: Tensor

    def scores(self, balance: Balance | None) -> Tensor:
        """(N, M) as `Router.scores` of a calibrated router."""
        quality = self.parts.to(torch.float32)
        if balance is not None:
            quality = balance.of(quality)
        return (self.shares.to(torch.float32).unsqueeze(2) * quality).sum(1)


@dataclass(frozen=True, slots=True)
class Learnt(Generic[Kind]):
    """A router, and what it says of its own questions."""

    router: Kind
    left_out: LeftOut


def fit_linear(questions: Sequence[str], quality: Tensor) -> Learnt[LinearRouter]:
    """How much better than the others each model is for a question. quality: (N, M), larger is better.

    The strength of the ridge is the one whose left-out predictions choose best; of equals the strongest.
    """
    points, target = _points(questions), leads(quality)
    bias = target.mean(0)
    values, vectors = torch.linalg.eigh(points @ points.T)
    fits = {ridge: _dual(values, vectors, target - bias, ridge) for ridge in RIDGES}
    chosen = max(RIDGES, key=lambda ridge: (_gain(target - fits[ridge].residuals, quality), ridge))
    weights = (points.T @ fits[chosen].duals).to(torch.float32)
    left_out = (target - fits[chosen].residuals).unsqueeze(1)
    router = LinearRouter(weights, bias.to(torch.float32))
    return Learnt(router, LeftOut(left_out, torch.ones(len(target), 1, dtype=torch.float64)))


def leads(quality: Tensor) -> Tensor:
    """(N, M) float64: each model's quality less the mean of all for that question, clipped at the median size.

    A least-squares fit of bits would be steered by the few questions whose difference is largest.
    """
    lead = quality.to(torch.float64) - quality.to(torch.float64).mean(1, keepdim=True)
    sizes = lead.abs()[lead != 0]
    return lead if not len(sizes) else lead.clamp(-float(sizes.median()), float(sizes.median()))


@dataclass(frozen=True, slots=True)
class _DualFit:
    """duals, residuals: (N, M); residuals of predictions without the question itself."""

    duals: Tensor
    residuals: Tensor


def _dual(values: Tensor, vectors: Tensor, target: Tensor, ridge: float) -> _DualFit:
    """Ridge regression over the eigenvectors of K; the left-out residual i is alpha_i / (K + ridge)^-1_ii."""
    inverse = 1 / (values + ridge)
    duals = vectors @ (inverse.unsqueeze(1) * (vectors.T @ target))
    return _DualFit(duals, duals / (vectors.square() * inverse).sum(1, keepdim=True))


def _gain(predicted: Tensor, quality: Tensor) -> float:
    """Mean quality of the models that the predictions choose, rounded."""
    return round(float(quality.gather(1, predicted.argmax(1, keepdim=True)).mean()), 9)


def _points(questions: Sequence[str]) -> Tensor:
    return torch.stack([dense(question) for question in questions]).to(torch.float64)  # (N, F)


@dataclass(frozen=True, slots=True)
class Clustering:
    """centres: (C, F); labels: (N,) the nearest centre of each point."""

    centres: Tensor
    labels: Tensor


def fit_clusters(
    questions: Sequence[str],
    quality: Tensor,
    num_clusters: int = NUM_CLUSTERS,
    near: int = NEAR,
    beta: float = BETA,
    seed: int = SEED,
) -> Learnt[ClusterRouter]:
    """Avengers: K-means of the questions, and each model's mean quality in each cluster. quality: (N, M)."""
    points, target = _points(questions), quality.to(torch.float64)
    found = lloyd(points, plus_plus(points, min(num_clusters, len(points)), seed))
    member = torch.nn.functional.one_hot(found.labels, len(found.centres)).to(torch.float64)  # (N, C)
    counts, sums = member.sum(0), member.T @ target  # (C,), (C, M)
    used = counts > 0
    accuracy = sums[used] / counts[used].unsqueeze(1)
    centres = found.centres[used]
    router = ClusterRouter(centres.to(torch.float32), accuracy.to(torch.float32), near, beta)
    nearest = (1 - points @ centres.T).topk(min(near, len(centres)), dim=1, largest=False, sorted=True)
    shares = torch.softmax(-beta * nearest.values, 1)  # (N, P)
    own = member[:, used].gather(1, nearest.indices).unsqueeze(2)  # (N, P, 1): is it the question's own cluster
    size = counts[used][nearest.indices].unsqueeze(2)
    without = (accuracy[nearest.indices] * size - own * target.unsqueeze(1)) / (size - own).clamp_min(1)
    alone = (size - own) < 1  # a cluster of one question says nothing of it
    return Learnt(router, LeftOut(torch.where(alone, target.mean(0), without), shares))


def plus_plus(points: Tensor, num: int, seed: int) -> Tensor:
    """(C, F) first centres: each next one a point drawn by its squared distance to the nearest (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < num and float(nearest.max()) > 0:
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return points[chosen].clone()


def lloyd(points: Tensor, centres: Tensor, iterations: int = _ITERATIONS) -> Clustering:
    """Lloyd's algorithm until no point changes its centre. A centre that loses all its points stays where it is."""
    labels = _nearest(points, centres)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = torch.bincount(labels, minlength=len(centres)).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        moved = _nearest(points, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    return Clustering(centres, labels)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)


def prefer(learnt: Learnt[Kind], strong: int, share: float, balance: Balance | None = None) -> Kind:
    """The router with a preference by which the model `strong` answers `share` of the questions.

    Judged by what it says of left-out questions: a router is surer of those that it knows.
    """
    scores = learnt.left_out.scores(balance)  # (N, M)
    others = torch.cat([scores[:, :strong], scores[:, strong + 1 :]], dim=1)
    lead = (scores[:, strong] - others.amax(1)).to(torch.float64)
    preference = torch.zeros(scores.shape[1])
    preference[strong] = -float(torch.quantile(lead, 1 - share))
    return replace(learnt.router, preference=preference)

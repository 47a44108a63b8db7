"""Fusion in relative space: DeePEn (Huang et al. 2024, arXiv 2404.12715), on candidates.

Each member's distribution is projected on the anchors that all members share (r_i = p_i R_i), the projections
are averaged (r = sum_i w_i r_i), and the average is carried back into main's vocabulary by one of two solvers:
`search`, the paper's few steps of AdamW on KL(r || softmax(z) R_main), and `em`, Richardson-Lucy steps on the
simplex. They are different operators: the search is a bounded nudge of main, EM moves until it explains r.

Invariants: the result sums to 1 with main's tail; main's tokens that have no row (control tokens) keep main's
own mass; nothing loops over tokens in Python. Does not know requests, or how matrices were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import Fused, FusionSpace, register
from ensemble_core.members.base import Candidates
from ensemble_core.transfer.matrix import TransferMatrix

NUM_REACHED = 64  # main tokens that join the support through anchors of r
_TINY = 1e-30
_ROUNDING = 1e-6  # a gap between projections that may be rounding


class RelativeOptions(BaseModel):
    """Options of the `relative` fusion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    solver: Literal["em", "search"] = Field("em", description="How r is carried back into main's vocabulary.")
    steps: int | None = Field(None, ge=1, le=100, description="Steps of the solver: 3 for em, 5 for search.")
    eta: float = Field(0.15, gt=0.0, le=10.0, description="Learning rate of the search; em has none.")
    support: Literal["closed", "full"] = Field(
        "closed", description="closed: candidates and what they reach. full: all of every vocabulary (slow)."
    )

    @property
    def num_steps(self) -> int:
        """The steps given, else the solver's default."""
        return self.steps or (3 if self.solver == "em" else 5)


@dataclass(frozen=True, slots=True)
class Problem:
    """One batch of inverse problems: find p on the support whose projection p R is r.

    An anchor that no token of the support reaches is out of the problem: r is 0 there.
    """

    prior: Tensor  # (B, S) p_main on the support, rows sum to 1
    columns: Tensor  # (B, S, k) int64: anchors of each token's row
    values: Tensor  # (B, S, k) their shares; rows sum to 1, or to 0 where prior is 0
    target: Tensor  # (B, A) r, rows sum to 1
    num_anchors: int  # A of the whole space

    def project(self, p: Tensor) -> Tensor:
        """q = p R_main, (B, S) -> (B, A)."""
        return _scatter(p.unsqueeze(2) * self.values, self.columns, self.num_anchors)

    def pull(self, anchors: Tensor) -> Tensor:
        """R_main x for an x over anchors, (B, A) -> (B, S)."""
        rows, width = self.columns.shape[0], self.columns.shape[1] * self.columns.shape[2]
        gathered = anchors.gather(1, self.columns.view(rows, width)).view_as(self.values)
        return (gathered * self.values).sum(dim=2)

    def ratio(self, p: Tensor) -> Tensor:
        """r / (p R_main), (B, A); 0 where nothing reaches, since r is 0 there."""
        return self.target / self.project(p).clamp_min_(_TINY)


def solve_em(problem: Problem, steps: int) -> Tensor:
    """p <- p * (R_main (r / (p R_main))), normalised; lowers KL(r || p R_main) at every step. (B, S)."""
    p = problem.prior
    for _ in range(steps):
        step = p * problem.pull(problem.ratio(p))
        mass = step.sum(dim=1, keepdim=True)
        # Where nothing that r speaks of can be reached, main stays as it is.
        p = torch.where(mass == 0.0, p, step / mass.clamp_min(_TINY))
    return p


def solve_search(problem: Problem, steps: int, eta: float) -> Tensor:
    """The paper's search: AdamW on KLDivLoss (mean), cosine annealing to eta/4 with T_max 10. (B, S).

    No autograd: with p = softmax(z), q = p R, g = -R (r/q), the gradient is p (g - <p, g>) / A.
    """
    beta1, beta2, epsilon, decay = 0.9, 0.999, 1e-8, 0.01
    z = problem.prior.log()
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    for t in range(steps):
        rate = eta / 4 + (eta - eta / 4) * (1 + math.cos(math.pi * t / 10)) / 2
        p = torch.softmax(z, dim=1)
        g = -problem.pull(problem.ratio(p))
        gradient = p * (g - (p * g).sum(dim=1, keepdim=True)) / problem.num_anchors
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        denominator = (second / (1 - beta2 ** (t + 1))).sqrt() + epsilon
        z = z * (1 - rate * decay) - rate / (1 - beta1 ** (t + 1)) * first / denominator
    return torch.softmax(z, dim=1)


@register("relative", RelativeOptions)
class RelativeFusion:
    """DeePEn on candidates; see the module."""

    name = "relative"

    def __init__(self, space: FusionSpace, options: RelativeOptions) -> None:
        self._matrices: Sequence[TransferMatrix] = [matrix.to(space.device) for matrix in space.matrices()]
        self._options = options
        self.full_vocabulary = options.support == "full"

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`. float32 throughout."""
        projections = [_relative(c, m) for c, m in zip(candidates, self._matrices, strict=True)]
        target = weights[:, :1] * projections[0][0]  # (B, A); in place from here: at B = 32 it is 6 MB a copy
        for i, (assistant, _) in enumerate(projections[1:], start=1):
            target.addcmul_(weights[:, i : i + 1], assistant)
        target = _normalised(target)
        support = self._support(candidates[0], target - projections[0][0])
        p = self._solve(self._problem(support, target))
        mass = torch.where(support.mapped, support.prior, 0.0).sum(dim=1, keepdim=True)
        fused = torch.where(support.mapped, p * mass, support.prior)
        unmapped = torch.stack([u for _, u in projections], dim=1)
        return Fused(support.token_ids, fused.log(), support.tail.log(), unmapped)

    def _support(self, main: Candidates, gap: Tensor) -> _Support:
        """The tokens to solve for; gap: (B, A) what r asks of each anchor beyond main's own projection."""
        prior, tail = main.logprobs.exp(), main.tail.exp()
        token_ids = main.token_ids
        if not self.full_vocabulary:
            token_ids, prior, tail = _extend(main, gap, self._matrices[0].anchor_ids)
        mapped = (self._matrices[0].row_mass[token_ids] > 0) & (prior > 0)
        return _Support(token_ids, prior, tail, mapped)

    def _problem(self, support: _Support, target: Tensor) -> Problem:
        columns, values = _rows(self._matrices[0], support.token_ids)
        prior = _normalised(torch.where(support.mapped, support.prior, 0.0))
        reached = target.mul_(_scatter(prior.unsqueeze(2) * values, columns, target.shape[1]) > _TINY)
        return Problem(prior, columns, values, _normalised(reached), target.shape[1])

    def _solve(self, problem: Problem) -> Tensor:
        if self._options.solver == "em":
            return solve_em(problem, self._options.num_steps)
        return solve_search(problem, self._options.num_steps, self._options.eta)


@dataclass(frozen=True, slots=True)
class _Support:
    token_ids: Tensor  # (B, S)
    prior: Tensor  # (B, S) p_main, an upper bound for tokens that are not among its candidates
    tail: Tensor  # (B,) p_main's mass outside
    mapped: Tensor  # (B, S) bool: has a row and any mass


def _relative(candidates: Candidates, matrix: TransferMatrix) -> tuple[Tensor, Tensor]:
    """r_i on the mass that the candidates hold, scaled to sum to 1 (B, A); and the mass without a row (B,)."""
    columns, values = _rows(matrix, candidates.token_ids)  # (B, K, k)
    p = candidates.logprobs.exp()
    r = _scatter(p.unsqueeze(2) * values, columns, matrix.num_anchors)
    unmapped = torch.where(matrix.row_mass[candidates.token_ids] > 0, 0.0, p).sum(dim=1)
    return _normalised(r), unmapped


def _rows(matrix: TransferMatrix, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and values (B, N, k) of tokens; float16 rows scaled to sum to 1 exactly, empty ones stay empty."""
    columns, values = matrix.rows(token_ids)
    return columns, values / values.sum(dim=2, keepdim=True).clamp_min(_TINY)


def _extend(main: Candidates, gap: Tensor, anchor_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Main's candidates and main's own tokens of the anchors with the largest gap: ids, prior (B, S), tail (B,).

    Where the assistants ask for nothing beyond main's own projection nothing joins, so two identical members are one.
    What main gives a token outside its candidates is unknown, but bounded by its least candidate and, together,
    by its tail: the smaller of the two is taken. The last eighth of a row does not count as least, since ids asked
    for by `also` stand there whatever their rank. A token that is a candidate already gets 0.
    """
    gaps, best = gap.topk(min(NUM_REACHED, gap.shape[1]), dim=1)
    extra = anchor_ids[best]  # (B, M)
    known = (extra.unsqueeze(2) == main.token_ids.unsqueeze(1)).any(dim=2) | (extra < 0) | (gaps <= _ROUNDING)
    tail = main.tail.exp()
    fresh = (~known).sum(dim=1).clamp_min(1)
    num_candidates = main.logprobs.shape[1]
    least = main.logprobs[:, : num_candidates - num_candidates // 8].amin(dim=1).exp()
    bound = torch.minimum(least, tail / fresh).unsqueeze(1)
    added = torch.where(known, 0.0, bound)
    token_ids = torch.cat([main.token_ids, extra.clamp_min(0)], dim=1)
    prior = torch.cat([main.logprobs.exp(), added], dim=1)
    return token_ids, prior, (tail - added.sum(dim=1)).clamp_min(0.0)


def _scatter(shares: Tensor, columns: Tensor, num_anchors: int) -> Tensor:
    """Sum (B, N, k) shares into their columns: (B, A)."""
    rows = shares.shape[0]
    out = shares.new_zeros(rows, num_anchors)
    return out.scatter_add_(1, columns.reshape(rows, -1), shares.reshape(rows, -1))


def _normalised(rows: Tensor) -> Tensor:
    """Rows scaled to sum to 1, in place; a row without mass stays so."""
    return rows.div_(rows.sum(dim=1, keepdim=True).clamp_min(_TINY))

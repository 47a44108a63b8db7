"""Fusion in relative space: DeePEn (Huang et al. 2024, arXiv 2404.12715), on candidates.

Each member's distribution is projected on the anchors that all members share (r_i = p_i R_i), the projections
are averaged (r = sum_i w_i r_i), and the average is carried back into main's vocabulary by one of two solvers:
`search`, the paper's few steps of AdamW on KL(r || softmax(z) R_main), and `em`, Richardson-Lucy steps on the
simplex. They are different operators: the search is a bounded nudge of main, EM moves until it explains r.

On candidates "outside" is one more place beside the anchors: each member's tail, and what r says of anchors that no
token of the support reaches, lie there, and main's tail is the one token that reaches it. So members are pooled in
what they leave outside, too.

Invariants: the result sums to 1 with its tail; main's tokens that have no row (control tokens) keep main's
own mass; a main with all the weight is a fixed point of EM, its tail included; nothing loops over tokens in Python.
Does not know requests, or how matrices were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ensemble_core.fusion.base import FUSIONS, ROUNDING, Fused, FusionSpace, Views, lead
from ensemble_core.fusion.support import SUPPOSED, floor_of, least_of
from ensemble_core.members.base import Candidates
from ensemble_core.members.kernels.choice import can_compile
from ensemble_core.members.ranking import ranked
from ensemble_core.transfer.matrix import TransferMatrix

if TYPE_CHECKING:
    from ensemble_core.fusion.relative_rows import Rows

NUM_REACHED = 64  # main tokens that join the support through anchors of r
_TINY = 1e-30
_BETA1, _BETA2, _DECAY = 0.9, 0.999, 0.01  # of the search's AdamW
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

    An anchor that no token of the support reaches is out of the problem, whatever r says of it.
    """

    prior: Tensor  # (B, S) p_main on the support, rows sum to 1
    columns: Tensor  # (B, S, k) int64: anchors of each token's row
    values: Tensor  # (B, S, k) their shares; rows sum to 1, or to 0 where prior is 0
    target: Tensor  # (B, A) r, rows sum to 1; or (B, A + 1) with the outside
    num_anchors: int  # A of the whole space, which the paper's loss is a mean over

    def project(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        """q = p R_main, (B, S) -> (B, A); into `out` where given."""
        q = torch.zeros_like(self.target) if out is None else out.zero_()
        return _add(q, p, self.columns, self.values)

    def at(self, anchors: Tensor) -> Tensor:
        """An x over anchors at the entries of the support's rows, (B, A) -> (B, S, k)."""
        return anchors.gather(1, self.columns.flatten(1)).view_as(self.values)

    def reached(self) -> Tensor:
        """r where some token with mass reaches, scaled to sum to 1 there, (B, A)."""
        return _normalised(self.target * (self.project(self.prior) > _TINY))


def solve_em(problem: Problem, steps: int) -> Tensor:
    """p <- p * (R_main (r / (p R_main))), normalised; lowers KL(r || p R_main) at every step. (B, S).

    Normalising makes it blind to the scale of r, and so to anchors of r that nothing reaches.
    """
    p = problem.prior
    wanted = problem.at(problem.target).mul_(problem.values)  # (B, S, k), the part of every step that stays
    q = torch.empty_like(problem.target)
    for _ in range(steps):
        at_rows = problem.at(problem.project(p, out=q)).clamp_min_(_TINY)
        step = p * torch.div(wanted, at_rows, out=at_rows).sum(dim=2)
        mass = step.sum(dim=1, keepdim=True)
        # Where nothing that r speaks of can be reached, main stays as it is.
        p = torch.where(mass == 0.0, p, step / mass.clamp_min(_TINY))
    return p


def solve_search(problem: Problem, steps: int, eta: float) -> Tensor:
    """The paper's search: AdamW on KLDivLoss (mean), cosine annealing to eta/4 with T_max 10. (B, S).

    No autograd: with p = softmax(z), q = p R, g = -R (r/q), the gradient is p (g - <p, g>) / A.
    """
    beta1, beta2, epsilon, decay = _BETA1, _BETA2, 1e-8, _DECAY
    z = problem.prior.log()
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    wanted = problem.at(problem.reached()).mul_(problem.values)
    q = torch.empty_like(problem.target)
    for t in range(steps):
        rate = _rate(t, eta)
        p = torch.softmax(z, dim=1)
        at_rows = problem.at(problem.project(p, out=q)).clamp_min_(_TINY)
        g = -torch.div(wanted, at_rows, out=at_rows).sum(dim=2)
        gradient = p * (g - (p * g).sum(dim=1, keepdim=True)) / problem.num_anchors
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        denominator = (second / (1 - beta2 ** (t + 1))).sqrt() + epsilon
        z = z * (1 - rate * decay) - rate / (1 - beta1 ** (t + 1)) * first / denominator
    return torch.softmax(z, dim=1)


def search_reach(steps: int, eta: float) -> tuple[float, float]:
    """How far the search can move logits: z becomes `kept` z + e with every |e| <= `reach`; (kept, reach).

    Step t adds -rate_t m/(sqrt(v) + eps) to (1 - rate_t decay) z. There m = sum a_i g_i and v = sum b_i g_i^2 are
    means over all gradients g_i so far, so by Cauchy and Schwarz |m| <= sqrt(sum a_i^2 / b_i) sqrt(v).
    """
    kept, reach = 1.0, 0.0
    for t in range(steps):
        a = [(1 - _BETA1) * _BETA1**i / (1 - _BETA1 ** (t + 1)) for i in range(t + 1)]
        b = [(1 - _BETA2) * _BETA2**i / (1 - _BETA2 ** (t + 1)) for i in range(t + 1)]
        step = math.sqrt(sum(x * x / y for x, y in zip(a, b, strict=True)))
        shrunk = 1 - _rate(t, eta) * _DECAY
        kept, reach = kept * shrunk, reach * shrunk + _rate(t, eta) * step
    return kept, reach


def _rate(t: int, eta: float) -> float:
    """The search's learning rate at step t: cosine annealing to eta / 4 with T_max 10."""
    return eta / 4 + (eta - eta / 4) * (1 + math.cos(math.pi * t / 10)) / 2


@FUSIONS.register("relative", RelativeOptions)
class RelativeFusion:
    """DeePEn on candidates; see the module."""

    name = "relative"

    def __init__(self, space: FusionSpace, options: RelativeOptions) -> None:
        self._matrices: Sequence[TransferMatrix] = [matrix.to(space.device) for matrix in space.matrices()]
        self._options = options
        self.full_vocabulary = options.support == "full"
        self._rows = self._as_rows(space.device) if options.solver == "em" and not self.full_vocabulary else None

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """See `Fusion.fuse`. float32 throughout.

        What `conclude` makes of the pooled views, without a copy of (B, A) for each member: 6 MB at 32 rows.
        """
        if self._rows is not None:
            return self._by_rows(self._rows, candidates, weights)
        main, *others = self._statements(candidates)
        weights = _heard([main, *others], weights)
        own = main.project()
        target = own * weights[:, :1]  # (B, A)
        for i, other in enumerate(others, start=1):
            _add(target, other.p * weights[:, i : i + 1], other.columns, other.values)
            target[:, -1] += other.outside * weights[:, i]
        gap = torch.sub(target, own, out=own)
        unmapped = torch.stack([main.unmapped, *(other.unmapped for other in others)], dim=1)
        return self._carried_back(main, weights[:, 0], target, gap, unmapped)

    def _as_rows(self, device: torch.device) -> list[Rows] | None:
        """The matrices for the compiled loop; None where it does not serve."""
        if device.type != "cpu" or len({matrix.columns.shape[1] for matrix in self._matrices}) > 1:
            return None
        return [_as_rows(matrix) for matrix in self._matrices] if can_compile() else None

    def _by_rows(self, rows: Sequence[Rows], candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """The same, row by row in a compiled loop."""
        from ensemble_core.fusion.relative_rows import Bounds, fuse_rows

        anchor_ids = self._matrices[0].anchor_ids
        reached = min(NUM_REACHED, len(anchor_ids))
        limits = Bounds(self._options.num_steps, reached, _TINY, _ROUNDING, SUPPOSED)
        least = least_of(candidates[0]).exp()
        ids, fused, rest, unmapped = fuse_rows(candidates, weights, rows, anchor_ids, least, limits)
        return Fused(ids, fused.log(), rest.log(), unmapped)

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """See `Pooled.views`: places are anchors and the outside. A member without a word on any has no weight."""
        statements = self._statements(candidates)
        return Views(
            main=candidates[0],
            token_ids=self._matrices[0].anchor_ids.expand(len(weights), -1),
            shares=torch.stack([statement.project() for statement in statements], dim=1),
            weights=_heard(statements, weights),
            unmapped=torch.stack([statement.unmapped for statement in statements], dim=1),
        )

    def certified(self, main: Candidates, weights: Tensor) -> Tensor:
        """See `Certifying.certified`. Of the search, which moves logits by its reach at most; EM knows no such bound.

        Two tokens that have rows lie `kept` D - 2 `reach` apart at least after D before. A token without a row keeps
        its probability; then the normaliser counts, which rises by `reach` + (1 - kept) log S at most over S places.
        """
        first, second = lead(main)
        if self._options.solver != "search":
            return torch.zeros_like(first, dtype=torch.bool)
        kept, reach = search_reach(self._options.num_steps, self._options.eta)
        places = main.logprobs.shape[1] + NUM_REACHED + 1
        needed = 2 * reach / kept + (1 - kept) * math.log(places) + ROUNDING
        top = main.token_ids.gather(1, main.logprobs.argmax(dim=1, keepdim=True)).squeeze(1)
        return (self._matrices[0].row_mass[top] > 0) & (first - second > needed)

    def conclude(self, views: Views, pooled: Tensor) -> Fused:
        """See `Pooled.conclude`: pooled is r."""
        main, own = _statement(views.main, self._matrices[0]), views.shares[:, 0]
        return self._carried_back(main, views.weights[:, 0], pooled.clone(), pooled - own, views.unmapped)

    def _statements(self, candidates: Sequence[Candidates]) -> list[_Statement]:
        return [_statement(part, matrix) for part, matrix in zip(candidates, self._matrices, strict=True)]

    def _carried_back(
        self, main: _Statement, weight: Tensor, target: Tensor, gap: Tensor, unmapped: Tensor
    ) -> Fused:
        """r in main's vocabulary; `target`, which is r, is used up.

        weight: (B,) main's part in r. gap: (B, A + 1) what r asks of each place beyond main's own projection.
        """
        support = self._support(main.candidates, gap[:, :-1])
        mass = torch.where(support.mapped, support.prior, 0.0).sum(dim=1) + support.tail
        p = self._solve(self._problem(support, weight / mass.clamp_min(_TINY), target, main)) * mass.unsqueeze(1)
        fused = torch.where(support.mapped, p[:, :-1], support.prior)
        return Fused(support.token_ids, fused.log(), p[:, -1].log(), unmapped)

    def _support(self, main: Candidates, gap: Tensor) -> _Support:
        prior, tail = main.logprobs.exp(), main.tail.exp()
        token_ids = main.token_ids
        if not self.full_vocabulary:
            token_ids, prior, tail = _extend(main, gap, self._matrices[0].anchor_ids)
        mapped = (self._matrices[0].row_mass[token_ids] > 0) & (prior > 0)
        return _Support(token_ids, prior, tail, mapped)

    def _problem(self, support: _Support, scale: Tensor, target: Tensor, main: _Statement) -> Problem:
        """The support and, as one more token, its tail. scale: (B,) of main's masses in r.

        Main's projection has outside what it is supposed to have beyond its candidates; in `target` that is put where
        the support has it, so that EM does not take it away.
        """
        num_own = main.columns.shape[1]
        columns, values = _rows(self._matrices[0], support.token_ids[:, num_own:])
        supposed = torch.where(support.mapped, support.prior, 0.0)[:, num_own:] * scale.unsqueeze(1)
        _add(target, supposed, columns, values)
        outside = target.shape[1] - 1
        target[:, outside] = (target[:, outside] - supposed.sum(dim=1)).clamp_min(0.0)
        tail_columns = torch.full_like(main.columns[:, :1], outside)
        tail_values = torch.zeros_like(main.values[:, :1])
        tail_values[:, :, 0] = 1.0
        mapped = torch.where(support.mapped, support.prior, 0.0)
        prior = _normalised(torch.cat([mapped, support.tail.unsqueeze(1)], dim=1))
        columns = torch.cat([main.columns, columns, tail_columns], dim=1)
        values = torch.cat([main.values, values, tail_values], dim=1)
        problem = Problem(prior, columns, values, target, outside)
        return problem if self.full_vocabulary else replace(problem, target=_gathered(problem))

    def _solve(self, problem: Problem) -> Tensor:
        if self._options.solver == "em":
            return solve_em(problem, self._options.num_steps)
        return solve_search(problem, self._options.num_steps, self._options.eta)


@dataclass(frozen=True, slots=True)
class _Support:
    token_ids: Tensor  # (B, S)
    prior: Tensor  # (B, S) p_main, supposed for tokens that are not among its candidates
    tail: Tensor  # (B,) p_main's mass outside
    mapped: Tensor  # (B, S) bool: has a row and any mass


@dataclass(frozen=True, slots=True)
class _Statement:
    """What a member's candidates say of anchors; r_i is `project()`."""

    candidates: Candidates
    p: Tensor  # (B, K) on tokens that have a row, scaled to sum to 1 with the tail (0 where there is none)
    columns: Tensor  # (B, K, k) int64
    values: Tensor  # (B, K, k)
    outside: Tensor  # (B,) the tail, on the same scale
    unmapped: Tensor  # (B,) the mass without a row
    num_anchors: int

    def project(self) -> Tensor:
        """r_i, (B, A + 1): anchors and the outside."""
        r = _add(self.p.new_zeros(self.p.shape[0], self.num_anchors + 1), self.p, self.columns, self.values)
        r[:, -1] = self.outside
        return r


def _statement(candidates: Candidates, matrix: TransferMatrix) -> _Statement:
    columns, values = _rows(matrix, candidates.token_ids)
    p, mapped = candidates.logprobs.exp(), matrix.row_mass[candidates.token_ids] > 0
    unmapped = torch.where(mapped, 0.0, p).sum(dim=1)
    tail = candidates.tail.exp().unsqueeze(1)
    said = _normalised(torch.cat([torch.where(mapped, p, 0.0), tail], dim=1))
    return _Statement(candidates, said[:, :-1], columns, values, said[:, -1], unmapped, matrix.num_anchors)


def _gathered(problem: Problem) -> Tensor:
    """r with what no token with mass reaches laid outside, (B, A + 1)."""
    reached = problem.target.where(problem.project(problem.prior) > _TINY, 0.0)
    reached[:, -1] += problem.target.sum(dim=1) - reached.sum(dim=1)
    return reached


def _heard(statements: Sequence[_Statement], weights: Tensor) -> Tensor:
    """Weights (B, M) of those who say anything, scaled to sum to 1 (or 0, where nobody does)."""
    return _normalised(weights * torch.stack([s.p.sum(dim=1) + s.outside for s in statements], dim=1))


def _as_rows(matrix: TransferMatrix) -> Rows:
    from ensemble_core.fusion.relative_rows import Rows

    values = matrix.values.float() / matrix.row_mass.clamp_min(_TINY).unsqueeze(1)
    return Rows(matrix.columns.contiguous(), values, matrix.row_mass)


def _rows(matrix: TransferMatrix, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and values (B, N, k) of tokens; float16 rows scaled to sum to 1 exactly, empty ones stay empty."""
    columns, values = matrix.rows(token_ids)
    return columns, values / matrix.row_mass[token_ids].clamp_min(_TINY).unsqueeze(2)


def _extend(main: Candidates, gap: Tensor, anchor_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Main's candidates and main's own tokens of the anchors with the largest gap: ids, prior (B, S), tail (B,).

    Where the assistants ask for nothing beyond main's own projection nothing joins, so two identical members are one.
    What main gives a token outside its candidates is supposed as in `support`: its floor, and all together a
    sixteenth of main's tail at most. Places that nothing fills repeat main's first id with no mass.
    """
    best = ranked(gap, NUM_REACHED)
    gaps = gap.gather(1, best)
    extra = anchor_ids[best]  # (B, M)
    known = (extra.unsqueeze(2) == main.token_ids.unsqueeze(1)).any(dim=2) | (extra < 0) | (gaps <= _ROUNDING)
    added = torch.where(known, 0.0, floor_of(main, (~known).sum(dim=1)).unsqueeze(1))
    token_ids = torch.cat([main.token_ids, torch.where(known, main.token_ids[:, :1], extra)], dim=1)
    prior = torch.cat([main.logprobs.exp(), added], dim=1)
    return token_ids, prior, (main.tail.exp() - added.sum(dim=1)).clamp_min(0.0)


def _add(anchors: Tensor, p: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Add p R to (B, A), in place: (B, N) masses, rows as (B, N, k) columns and values."""
    return anchors.scatter_add_(1, columns.flatten(1), (p.unsqueeze(2) * values).flatten(1))


def _normalised(rows: Tensor) -> Tensor:
    """Rows scaled to sum to 1, in place; a row without mass stays so."""
    return rows.div_(rows.sum(dim=1, keepdim=True).clamp_min(_TINY))

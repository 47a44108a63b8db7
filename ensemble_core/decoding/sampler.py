"""Samples one token per row from shaped distributions.

Temperature, top-k, top-p and min-p act in this order, after fusion and shaping. Tokens are ordered from likely to
unlikely, of equals the lowest id first. Each step takes one uniform number from the sequence's own generator and
looks it up in the cumulative distribution over that order. Greedy takes the first token.

Invariant: a row's token does not depend on other rows, on the order of columns, or on entries of -inf. Sums of floats
would depend on the width of the rows, so weights are rounded to whole numbers, whose sums are exact.

A token outside the fused support (the tail) is never drawn, so `scheduler.num_candidates` bounds how far down the
distribution sampling can reach. Does not know fusion or members.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused
from ensemble_core.members.ranking import ranked

# The whole-number weight of the likeliest token. The sum of 2^20 such weights still fits in 63 bits.
UNITS = 2.0**42


def sample(fused: Fused, sequences: abc.Sequence[Sequence], ahead: abc.Sequence[int] | None = None) -> list[int]:
    """One of main's token ids for each of B rows; -1 for a row with NaN or +inf, or with nothing above -inf.

    ahead: for each row, how many tokens that are not final lie before its place; None: none.
    """
    token_ids, logprobs = fused.token_ids, fused.logprobs
    tokens = greedy(token_ids, logprobs)
    rows = [i for i, sequence in enumerate(sequences) if not sequence.request.params.greedy]
    if rows:
        index = torch.tensor(rows, device=tokens.device)
        drawn = [[sequences[i].draw(ahead[i] if ahead is not None else 0)] for i in rows]
        steps = ladder(token_ids[index], logprobs[index], [sequences[i].request.params for i in rows])
        place = steps.find(torch.tensor(drawn, dtype=torch.float64, device=tokens.device))
        tokens[index] = steps.token_ids.gather(1, place).squeeze(1)
    broken = ~logprobs.amax(dim=1).isfinite()
    return torch.where(broken, -1, tokens).tolist()


def greedy(token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """Each row's likeliest id, of equals the lowest. (B, S) ids and log-probabilities -> (B,)."""
    best = logprobs.amax(dim=1, keepdim=True)
    highest = torch.iinfo(torch.int64).max
    return torch.where(logprobs == best, token_ids, highest).amin(dim=1)


@dataclass(frozen=True, slots=True)
class Ladder:
    """B rows of tokens from likely to unlikely, with the whole-number weights that they are drawn by, summed up."""

    token_ids: Tensor  # (B, S) int64
    mass: Tensor  # (B, S) int64
    total: Tensor  # (B, 1) int64, the mass of tokens in reach of top-k, top-p and min-p

    def find(self, uniform: Tensor) -> Tensor:
        """The place at a number from [0, 1) of each row, (B, 1) float64 -> (B, 1)."""
        aim = (uniform * self.total.double()).long().minimum(self.total - 1)
        return torch.searchsorted(self.mass, aim, right=True)

    def within(self, place: Tensor, uniform: Tensor) -> Tensor:
        """How far within the part of its place a number lies: again from [0, 1), whatever the place."""
        end = self.mass.gather(1, place).minimum(self.total)
        begin = torch.where(place > 0, self.mass.gather(1, (place - 1).clamp_min(0)), 0)
        return ((uniform * self.total.double() - begin) / (end - begin)).clamp(0.0, 1.0 - 2**-53)

    def shares(self) -> Tensor:
        """(B, S) float64: the probability of each token."""
        reached = self.mass.minimum(self.total)
        return reached.diff(dim=1, prepend=torch.zeros_like(self.total)) / self.total


def ladder(token_ids: Tensor, logprobs: Tensor, params: abc.Sequence[SamplingParams]) -> Ladder:
    """What tokens (B, S) are drawn from under each row's parameters."""
    order = ranked(logprobs, logprobs.shape[1], token_ids)
    logprobs = logprobs.gather(1, order).double()
    distance = logprobs - logprobs[:, :1]  # 0 for the likeliest, so no temperature can overflow
    temperature = _column(params, lambda p: p.temperature, logprobs.device)
    relative = (distance / temperature).exp().nan_to_num()
    mass = (relative * UNITS).round().long().cumsum(dim=1)
    total = mass.gather(1, _num_in_reach(relative, mass, params) - 1)
    return Ladder(token_ids.gather(1, order), mass, total)


def _num_in_reach(relative: Tensor, mass: Tensor, params: abc.Sequence[SamplingParams]) -> Tensor:
    """(B, 1) how many of the likeliest tokens top-k, top-p and min-p keep, at least 1.

    relative: (B, S) weights relative to the likeliest. mass: (B, S) cumulative sums of the whole-number weights.
    """
    device, width = relative.device, relative.shape[1]
    top_k = _column(params, lambda p: min(p.top_k or width, width), device).long()
    # The token that crosses top_p is kept.
    limit = _column(params, lambda p: p.top_p, device) * mass.gather(1, top_k - 1).double()
    before = (mass.roll(1, dims=1).double() < limit)[:, 1:]
    likely = (relative >= _column(params, lambda p: p.min_p, device))[:, 1:]
    return (before & likely).sum(dim=1, keepdim=True).add(1).minimum(top_k)


def _column(
    params: abc.Sequence[SamplingParams], value: Callable[[SamplingParams], float], device: torch.device
) -> Tensor:
    """(B, 1) one parameter for every row."""
    return torch.tensor([[value(p)] for p in params], dtype=torch.float64, device=device)

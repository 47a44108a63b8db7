"""Which drafted tokens a fusion keeps when sampling: speculative sampling (Leviathan et al. 2023, arXiv 2211.17192).

A token x that main drew from p is kept with probability min(1, q(x) / p(x)), where q is the fusion's distribution;
else one is drawn from the positive part of q - p, normalised. So the token has the distribution q, and it is the
drafted one as often as any method can have it.

Both take the place's one random number: where it fell within x's part of p is itself uniform and independent of x.
So the token depends on what is said at its place and on its seed, on nothing else. Rows do not affect one another.
Does not know places, members or drafts.
"""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from ensemble_core.decoding.sampler import UNITS, Ladder, ladder
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused


def accept(own: Fused, fused: Fused, sequences: abc.Sequence[Sequence], ahead: abc.Sequence[int]) -> list[int]:
    """The token of each of B sampled rows, which main would have drawn from `own` alone; both are shaped.

    ahead: for each row, how many tokens that are not final lie before its place. -1 for a row of `fused` with NaN or
    +inf, or with nothing above -inf.
    """
    params = [sequence.request.params for sequence in sequences]
    numbers = [[sequence.draw(count)] for sequence, count in zip(sequences, ahead, strict=True)]
    uniform = torch.tensor(numbers, dtype=torch.float64, device=own.token_ids.device)
    p, q = ladder(own.token_ids, own.logprobs, params), ladder(fused.token_ids, fused.logprobs, params)
    place = p.find(uniform)
    rest = p.within(place, uniform)
    drawn = p.token_ids.gather(1, place)
    shares_p, shares_q = p.shares(), q.shares()
    kept = torch.where(q.token_ids == drawn, shares_q, 0.0).sum(dim=1, keepdim=True) / shares_p.gather(1, place)
    left = ((rest - kept) / (1.0 - kept).clamp_min(1e-12)).clamp(0.0, 1.0)
    other = _beyond(p, q, shares_p, shares_q, left)
    tokens = torch.where((rest < kept) | (other < 0), drawn, other).squeeze(1)
    broken = ~fused.logprobs.amax(dim=1).isfinite()
    return torch.where(broken, -1, tokens).tolist()


def _beyond(p: Ladder, q: Ladder, shares_p: Tensor, shares_q: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1) tokens from the positive part of q - p at a uniform number; -1 where there is none."""
    more = (shares_q - _at(p.token_ids, shares_p, q.token_ids)).clamp_min(0.0)
    most = more.amax(dim=1, keepdim=True)
    mass = (more / most.clamp_min(1e-300) * UNITS).round().long().cumsum(dim=1)
    rest = Ladder(q.token_ids, mass, mass[:, -1:])
    place = rest.find(uniform).clamp_max(mass.shape[1] - 1)  # of a row with NaN it may lie beyond
    return torch.where(rest.total > 0, rest.token_ids.gather(1, place), -1)


def _at(token_ids: Tensor, shares: Tensor, wanted: Tensor) -> Tensor:
    """The shares (B, K) of unique ids at the ids wanted, (B, S); 0 where one is not among them."""
    ids, order = token_ids.sort(dim=1)
    found = torch.searchsorted(ids, wanted).clamp_max(ids.shape[1] - 1)
    return torch.where(ids.gather(1, found) == wanted, shares.gather(1, order).gather(1, found), 0.0)

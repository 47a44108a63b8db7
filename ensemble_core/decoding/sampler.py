"""One token per row from shaped distributions.

Temperature, top-k, top-p and min-p act in this order, after fusion and shaping. Randomness is one uniform number a
step from the sequence's own generator, looked up in the cumulative distribution over tokens from likely to unlikely,
of equals the lowest id first. Greedy takes the first of that order.

Invariant: a row's token does not depend on the other rows, the order of the columns, or entries of -inf. Sums of
floats would depend on how wide the rows are, so weights are rounded to whole numbers, whose sums are exact.

A token outside the fused support (the tail) is never drawn: num_candidates of the configuration bounds how far
down the distribution sampling can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence as Request
from ensemble_core.fusion.base import Fused
from ensemble_core.members.ranking import ranked

# A weight is a whole number of these parts of the likeliest token's: 2^20 weights still add up within 63 bits.
_UNITS = 2.0**42


def sample(fused: Fused, sequences: Sequence[Request]) -> list[int]:
    """A token id of main's vocabulary for each of B rows; -1 where a row holds NaN, +inf, or nothing above -inf."""
    token_ids, logprobs = fused.token_ids, fused.logprobs
    tokens = greedy(token_ids, logprobs)
    rows = [i for i, sequence in enumerate(sequences) if not sequence.request.params.greedy]
    if rows:
        index = torch.tensor(rows, device=tokens.device)
        tokens[index] = _draw(token_ids[index], logprobs[index], [sequences[i] for i in rows])
    broken = ~logprobs.amax(dim=1).isfinite()
    return torch.where(broken, -1, tokens).tolist()


def greedy(token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """The likeliest id of each row, of equals the lowest: (B, S) ids and log-probabilities -> (B,)."""
    best = logprobs.amax(dim=1, keepdim=True)
    highest = torch.iinfo(torch.int64).max
    return torch.where(logprobs == best, token_ids, highest).amin(dim=1)


def _draw(token_ids: Tensor, logprobs: Tensor, sequences: Sequence[Request]) -> Tensor:
    """(B,) ids drawn from (B, S) log-probabilities under each sequence's parameters."""
    params = [sequence.request.params for sequence in sequences]
    device = logprobs.device
    uniform = torch.tensor([[s.draw()] for s in sequences], dtype=torch.float64, device=device)
    order = ranked(logprobs, logprobs.shape[1], token_ids)
    logprobs = logprobs.gather(1, order).double()
    distance = logprobs - logprobs[:, :1]  # that of the likeliest is 0: no temperature makes it overflow
    relative = (distance / _column(params, lambda p: p.temperature, device)).exp().nan_to_num()
    mass = (relative * _UNITS).round().long().cumsum(dim=1)
    total = mass.gather(1, _num_in_reach(relative, mass, params) - 1)
    aim = (uniform * total.double()).long().minimum(total - 1)
    place = torch.searchsorted(mass, aim, right=True)
    return token_ids.gather(1, order.gather(1, place)).squeeze(1)


def _num_in_reach(relative: Tensor, mass: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(B, 1) how many of the likeliest top-k, top-p and min-p leave, at least 1.

    relative: (B, S) weights over that of the likeliest. mass: (B, S) cumulative sums of their whole numbers.
    """
    device, width = relative.device, relative.shape[1]
    top_k = _column(params, lambda p: min(p.top_k or width, width), device).long()
    # The token that crosses top_p is still in.
    limit = _column(params, lambda p: p.top_p, device) * mass.gather(1, top_k - 1).double()
    before = (mass.roll(1, dims=1).double() < limit)[:, 1:]
    likely = (relative >= _column(params, lambda p: p.min_p, device))[:, 1:]
    return (before & likely).sum(dim=1, keepdim=True).add(1).minimum(top_k)


def _column(
    params: Sequence[SamplingParams], value: Callable[[SamplingParams], float], device: torch.device
) -> Tensor:
    """(B, 1) one parameter of every row."""
    return torch.tensor([[value(p)] for p in params], dtype=torch.float64, device=device)

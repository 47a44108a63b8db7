"""One token per row from shaped distributions.

Temperature, top-k, top-p and min-p act in this order, after fusion and shaping. Randomness is one uniform number a
step from the sequence's own generator, looked up in the cumulative distribution over tokens from likely to unlikely:
so a seeded request gives the same tokens whatever else is in the batch. Greedy takes the likeliest token, of equals
the lowest id.

A token outside the fused support (the tail) is never drawn: num_candidates of the configuration bounds how far
down the distribution sampling can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused


def sample(fused: Fused, sequences: Rows[Sequence]) -> list[int]:
    """A token id of main's vocabulary for each of B rows; -1 where a row is not finite."""
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


def _draw(token_ids: Tensor, logprobs: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """(B,) ids drawn from (B, S) log-probabilities under each sequence's parameters."""
    params = [sequence.request.params for sequence in sequences]
    device = logprobs.device
    uniform = torch.tensor([[s.rng.random()] for s in sequences], dtype=torch.float64, device=device)
    ordered, order = logprobs.sort(dim=1, descending=True, stable=True)
    probs = torch.softmax(ordered.double() / _column(params, lambda p: p.temperature, device), dim=1)
    probs = torch.where(_in_reach(probs, params), probs, 0.0)
    mass = probs.cumsum(dim=1)
    place = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    last = (probs > 0).sum(dim=1, keepdim=True) - 1  # -1 in a row that is not finite
    place = place.minimum(last).clamp_min(0)
    return token_ids.gather(1, order.gather(1, place)).squeeze(1)


def _in_reach(probs: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """Which of (B, S) probabilities, from likely to unlikely, top-k, top-p and min-p leave; a prefix of each row."""
    device, width = probs.device, probs.shape[1]
    top_k = _column(params, lambda p: p.top_k or width, device)
    kept = (torch.arange(width, device=device) < top_k) & (probs > 0)
    left = torch.where(kept, probs, 0.0)
    left = left / left.sum(dim=1, keepdim=True)
    # The token that crosses top_p is still in.
    kept &= left.cumsum(dim=1) - left < _column(params, lambda p: p.top_p, device)
    return kept & (left >= _column(params, lambda p: p.min_p, device) * left[:, :1])


def _column(
    params: Rows[SamplingParams], value: Callable[[SamplingParams], float], device: torch.device
) -> Tensor:
    """(B, 1) one parameter of every row."""
    return torch.tensor([[value(p)] for p in params], dtype=torch.float64, device=device)

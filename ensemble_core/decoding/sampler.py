"""One token per row from fused distributions.

Temperature, then top-p, act after fusion. Randomness is one uniform number a step from the sequence's own
generator, looked up in the cumulative distribution over tokens from likely to unlikely: so a seeded request gives
the same tokens whatever else is in the batch. Greedy takes the likeliest token, of equals the lowest id.

A token outside the fused support (the tail) is never drawn: num_candidates of the configuration bounds how far
down the distribution sampling can reach.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused


def sample(fused: Fused, sequences: Rows[Sequence]) -> list[int]:
    """A token id of main's vocabulary for each of B rows; -1 where a row is not finite."""
    tokens = greedy(fused.token_ids, fused.logprobs)
    rows = [i for i, sequence in enumerate(sequences) if not sequence.request.params.greedy]
    if rows:
        index = torch.tensor(rows, device=tokens.device)
        drawn = _draw(fused.token_ids[index], fused.logprobs[index], [sequences[i] for i in rows])
        tokens[index] = drawn
    broken = ~fused.logprobs.amax(dim=1).isfinite()
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
    temperature = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
    uniform = torch.tensor([[s.rng.random()] for s in sequences], dtype=torch.float64, device=device)
    ordered, order = logprobs.sort(dim=1, descending=True, stable=True)
    probs = torch.softmax(ordered.double() / temperature, dim=1)
    cumulative = probs.cumsum(dim=1)
    allowed = (cumulative - probs < top_p) & (probs > 0)  # the token that crosses top_p is still in
    mass = torch.where(allowed, probs, 0.0).cumsum(dim=1)
    place = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    last = allowed.sum(dim=1, keepdim=True) - 1  # -1 in a row that is not finite
    place = place.minimum(last).clamp_min(0)
    return token_ids.gather(1, order.gather(1, place)).squeeze(1)

"""Weights by perplexity: a member that predicts the prompt well weighs more in the answer (PackLLM).

w_i ~ v_i exp(-NLL_i / tau), where v_i are the configured weights and NLL_i is the mean negative log-likelihood of the
prompt in nats per byte, which can be compared across tokenizers. It comes from the prefill, with no second forward. A
member's tokens count from the second that spells text on, since the context of the first differs between members.
Control tokens are context and do not count. If some member has no token to count, as in a prompt of one token, the
configured weights are kept.

Knows tokens and numbers; does not know the engine. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble_core.text.alignment import Track


@dataclass(slots=True)
class PromptLikelihood:
    """One prompt's log-likelihood in every member, summed during prefill, and the resulting weights.

    weights: None until `settle`, then main first.
    """

    weights: tuple[float, ...] | None = None
    _nats: dict[str, float] = field(default_factory=dict)
    _num_bytes: dict[str, int] = field(default_factory=dict)

    def following(self, track: Track, count: int) -> tuple[int, ...]:
        """For the next `count` tokens to feed, the id after each; -1 if it does not count; () if none does."""
        ids, spelt = track.prompt_ids, track.vocabulary.text_bytes
        first = next((index for index, token_id in enumerate(ids) if spelt(token_id)), len(ids))
        rows = range(track.num_cached + 1, track.num_cached + 1 + count)
        found = tuple(ids[row] if first < row < len(ids) and spelt(ids[row]) else -1 for row in rows)
        return found if max(found, default=-1) >= 0 else ()

    def add(self, member: str, track: Track, following: tuple[int, ...], logprob: float) -> None:
        """Add a chunk of the prompt. logprob: total of its counted ids, in nats."""
        num_bytes = sum(len(track.vocabulary.text_bytes(token_id)) for token_id in following if token_id >= 0)
        self._nats[member] = self._nats.get(member, 0.0) - logprob
        self._num_bytes[member] = self._num_bytes.get(member, 0) + num_bytes

    def settle(self, prior: Mapping[str, float], tau: float) -> tuple[float, ...]:
        """Compute the weights once the prompt is read. prior: member -> configured weight, main first."""
        self.weights = tuple(prior.values())
        if all(self._num_bytes.get(member) for member in prior):
            rates = [self._nats[member] / self._num_bytes[member] for member in prior]
            self.weights = weigh(self.weights, rates, tau)
        return self.weights

    def reset(self) -> None:
        """Forget everything, since the prompt is computed again."""
        self._nats, self._num_bytes = {}, {}


def weigh(prior: tuple[float, ...], rates: list[float], tau: float) -> tuple[float, ...]:
    """prior_i exp(-rates_i / tau), scaled to sum to 1. A rate that is not finite gives 0, all of them the prior."""
    known = [(w, rate) for w, rate in zip(prior, rates, strict=True) if w > 0 and math.isfinite(rate)]
    if not known:
        return prior
    least = min(rate for _, rate in known)
    raw = [
        w * math.exp((least - rate) / tau) if math.isfinite(rate) else 0.0
        for w, rate in zip(prior, rates, strict=True)
    ]
    return tuple(part / sum(raw) for part in raw)

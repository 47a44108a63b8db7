"""Weights by perplexity: what each member makes of a prompt says how much it weighs in the answer (PackLLM).

w_i ~ v_i exp(-NLL_i / tau), where v_i are the configured weights and NLL_i is the mean negative log-likelihood of
the prompt in nats per byte, so that members with other tokenizers compare. It falls out of the prefill: no second
forward. Counted are a member's tokens behind its first one that spells text (what stands before that differs between
members); control tokens are context and are not counted. Where some member has nothing to count, as in a prompt of
one token, the configured weights stand.
Knows tokens and numbers; no torch, no engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble_core.text.alignment import Track

Weights = tuple[float, ...]


@dataclass(slots=True)
class PromptLikelihood:
    """One prompt's log-likelihood in every member while it is prefilled, and the weights that come of it.

    weights: None until `settle`, then main first.
    """

    weights: Weights | None = None
    _nats: dict[str, float] = field(default_factory=dict)
    _num_bytes: dict[str, int] = field(default_factory=dict)

    def following(self, track: Track, count: int) -> tuple[int, ...]:
        """Of the next `count` tokens to feed: the id that follows each, -1 where it is not counted; () if none is."""
        ids, spelt = track.prompt_ids, track.vocabulary.text_bytes
        first = next((index for index, token_id in enumerate(ids) if spelt(token_id)), len(ids))
        rows = range(track.num_cached + 1, track.num_cached + 1 + count)
        found = tuple(ids[row] if first < row < len(ids) and spelt(ids[row]) else -1 for row in rows)
        return found if max(found, default=-1) >= 0 else ()

    def add(self, member: str, track: Track, following: tuple[int, ...], logprob: float) -> None:
        """The log-probability of all that was asked for at a piece of the prompt, in nats."""
        num_bytes = sum(len(track.vocabulary.text_bytes(token_id)) for token_id in following if token_id >= 0)
        self._nats[member] = self._nats.get(member, 0.0) - logprob
        self._num_bytes[member] = self._num_bytes.get(member, 0) + num_bytes

    def settle(self, prior: Mapping[str, float], tau: float) -> Weights:
        """The weights, now that the prompt is read. prior: member -> configured weight, main first."""
        self.weights = tuple(prior.values())
        if all(self._num_bytes.get(member) for member in prior):
            rates = [self._nats[member] / self._num_bytes[member] for member in prior]
            self.weights = weigh(self.weights, rates, tau)
        return self.weights

    def reset(self) -> None:
        """The prompt is computed anew."""
        self._nats, self._num_bytes = {}, {}


def weigh(prior: Weights, rates: list[float], tau: float) -> Weights:
    """prior_i exp(-rates_i / tau), scaled to sum to 1; a rate that is not finite gives 0, all of them the prior."""
    known = [(w, rate) for w, rate in zip(prior, rates, strict=True) if w > 0 and math.isfinite(rate)]
    if not known:
        return prior
    least = min(rate for _, rate in known)
    raw = [
        w * math.exp((least - rate) / tau) if math.isfinite(rate) else 0.0
        for w, rate in zip(prior, rates, strict=True)
    ]
    return tuple(part / sum(raw) for part in raw)

"""A token's log-probability: with ids, for the engine, and with bytes, for clients. No torch.

Knows tracks and vocabularies; does not know sequences, or where the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemble_core.decoding.requests import Alternative, TokenLogprob
from ensemble_core.text.alignment import Track


@dataclass(frozen=True, slots=True)
class Scored:
    """A token's fused log-probability, and the likeliest ids with theirs, the token among them. rank: from 1."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


def describe_token(track: Track, token_id: int, scored: Scored, offset: int) -> TokenLogprob:
    """A token and its alternatives with their spellings."""
    tokens = track.vocabulary.tokens
    top = tuple(Alternative(other, tokens[other], logprob) for other, logprob in scored.top)
    return TokenLogprob(token_id, tokens[token_id], scored.logprob, offset, top, scored.rank)

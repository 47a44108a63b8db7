"""Sharpening of a fused distribution that is in doubt over how a word goes on (SAFE, arXiv 2510.15346, section 3).

Where no token has half of the mass, the likeliest one gets the mass of other likely tokens that begin with its text:
they say the same, in longer pieces. Knows tokens' bytes; does not know members or requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ensemble_core.fusion.base import Fused

_DOUBT, _LIKELY = 0.5, 0.1  # no token has more; a token has more


def sharpened(fused: Fused, text_of: Callable[[int], bytes]) -> Fused:
    """The same support, with doubtful rows sharpened. text_of: what a token of main spells. Sums stay."""
    doubtful = (fused.logprobs.amax(dim=1) < math.log(_DOUBT)).nonzero().flatten().tolist()
    if not doubtful:
        return fused
    logprobs = fused.logprobs.clone()
    for row in doubtful:
        _sharpen(fused.token_ids[row], logprobs[row], text_of)
    return replace(fused, logprobs=logprobs)


def _sharpen(token_ids: torch.Tensor, logprobs: torch.Tensor, text_of: Callable[[int], bytes]) -> None:
    """One row, in place: at most nine tokens have a tenth of the mass."""
    likely = (logprobs > math.log(_LIKELY)).nonzero().flatten().tolist()
    best = logprobs.max()
    tops = [place for place in likely if logprobs[place] == best]
    if not tops:
        return
    top = min(tops, key=lambda place: int(token_ids[place]))
    beginning = text_of(int(token_ids[top]))
    longer = [p for p in likely if p != top and beginning and text_of(int(token_ids[p])).startswith(beginning)]
    if longer:
        logprobs[top] = logprobs[[top, *longer]].logsumexp(dim=0)
        logprobs[longer] = -torch.inf

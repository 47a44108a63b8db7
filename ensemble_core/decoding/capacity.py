"""What bounds the scheduler: each member's cache, and the limits of the engine. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Capacity:
    """A member's cache as the scheduler sees it."""

    page_size: int  # tokens
    num_pages: int
    max_len: int  # tokens per sequence
    min_prefix: int = 1  # tokens; a shorter prefix is never reused


MOST_ANSWERS = 512  # of a step that answers at every position of a prompt: each is a row of logits

Spare = Literal["earlier", "all", "none"]  # which running streams the prompts must not slow down too much


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the whole engine."""

    max_running: int
    max_waiting: int
    token_budget: int  # most tokens that a member is fed in one step
    max_stretch: float = math.inf  # longest step with prefill over one without, while streams are spared
    max_queued_tokens: float = math.inf  # main's prompt tokens that may wait
    spare: Spare = "earlier"

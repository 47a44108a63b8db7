"""What a council needs of an engine. The runtime opens this door for a server, `offline` for one thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ensemble_core.decoding.requests import GenerationRequest, Prompt
from ensemble_core.streaming import OutputStream


class Places(Protocol):
    """Places in the engine's queue that are kept for one request."""

    def release(self) -> None:
        """Give them back."""


@dataclass(frozen=True, slots=True)
class EngineDoor:
    """What a council needs of the engine.

    submit: requests to members and ensembles, all or none. room: tokens that a model's context has left behind a
    prompt. reserve: places in the queue for a council; raises QueueFullError. stream: an empty stream whose requests
    end through the given function.
    """

    submit: Callable[[Sequence[GenerationRequest]], Awaitable[OutputStream]]
    room: Callable[[str, Prompt], Awaitable[int]]
    reserve: Callable[[str, int], Awaitable[Places]]
    stream: Callable[[Callable[[list[int]], None]], OutputStream]

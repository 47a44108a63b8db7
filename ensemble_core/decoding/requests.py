"""What goes into the engine's thread and what comes out of it. No torch.

A request is one prompt with one set of parameters; `n` choices are n requests. It does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ensemble_core.decoding.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a request changes of its ensemble: our extension `ensemble` of the API. None: as configured."""

    members: tuple[str, ...] | None = None  # a subset, main among them
    weights: Mapping[str, float] | None = None
    fusion: str | None = None
    fusion_options: Mapping[str, Any] | None = None
    mode: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for one model (an ensemble or a member)."""

    request_id: str
    model: str
    prompt: str | tuple[Mapping[str, str], ...]  # plain text, or a conversation (role, content)
    params: SamplingParams
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True, slots=True)
class Output:
    """One step's news of one request. The last one has a `finish_reason`.

    text: whole characters, stop strings already cut; may be empty. token_ids: main's, emitted since the last
    output. Counts are main's tokens so far.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string, or the id of a stop token other than the default
    error: str | None = None  # for finish_reason "error"

"""From a body to the engine's requests: parameters, counts, seeds, overrides.

Invariants: choice i of prompt p is request p * num_sampled + i; its seed is the request's seed + i, so a prompt's
choices do not depend on the prompts beside it. Counts are bounded before anything is allocated. Nothing here knows
HTTP, or the form of an endpoint's answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ensemble_core.decoding.requests import (
    CouncilBounds,
    GenerationRequest,
    Overrides,
    Prompt,
    Weighting,
    salted,
)
from ensemble_core.decoding.sampling_params import MAX_SEED, PARAMETERS, SamplingParams
from ensemble_core.errors import InvalidRequestError
from server.schema.sampling import EnsembleOptions, GenerationFields, SamplingFields, WeightingChoice


@dataclass(frozen=True, slots=True)
class Ticket:
    """One accepted body: the engine's requests, and which usage its stream reports."""

    id: str
    created: int
    model: str
    num_choices: int  # n: choices of each prompt that the client gets
    num_sampled: int  # best_of: choices of each prompt that the engine samples
    requests: tuple[GenerationRequest, ...]
    final_usage: bool
    running_usage: bool


def make_ticket(
    body: GenerationFields,
    prefix: str,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    counts: tuple[int, int],
    add_special_tokens: bool = True,
    truncate: int | None = None,
) -> Ticket:
    """The engine's requests, prompt by prompt. prefix: of the ids; counts: n and best_of, already bounded.

    truncate: see `GenerationRequest`.
    """
    final_usage, running_usage = stream_options(body) if isinstance(body, SamplingFields) else (True, False)
    ticket_id = f"{prefix}{uuid.uuid4().hex}"
    overrides = to_overrides(body.ensemble)
    trace = bool(body.ensemble and body.ensemble.trace)
    num_choices, num_sampled = counts
    salt = "" if body.cache_salt is None else salted(body.cache_salt)
    seeded = [_with_seed(params, index) for index in range(num_sampled)]
    requests = tuple(
        GenerationRequest(
            f"{ticket_id}-{rank * num_sampled + index}",
            body.model,
            prompt,
            each,
            overrides,
            add_special_tokens,
            trace,
            group=f"{ticket_id}-{rank}",
            watched=bool(body.stream),
            truncate=truncate,
            salt=salt,
            priority=body.priority or 0,
        )
        for rank, prompt in enumerate(prompts)
        for index, each in enumerate(seeded)
    )
    created = int(time.time())
    return Ticket(ticket_id, created, body.model, num_choices, num_sampled, requests, final_usage, running_usage)


def check_count(name: str, count: int, num_prompts: int, max_choices: int) -> int:
    """`count`, after checking that prompts x count is within bounds. name: the field that carried it."""
    if count < 1:
        raise InvalidRequestError(f"{name} must be at least 1, got {count}", name)
    if num_prompts * count > max_choices:
        raise InvalidRequestError(
            f"prompts x {name} must be at most {max_choices} (server.max_choices), got {num_prompts} x {count}",
            name if num_prompts <= max_choices else "prompt",
        )
    return count


def check_named(token_ids: Sequence[int] | None, *, asked: bool, needs: str) -> None:
    """Raise InvalidRequestError for ids whose log-probabilities nobody would see. needs: what must be sent, too."""
    if token_ids and not asked:
        raise InvalidRequestError(f"logprob_token_ids is only allowed with {needs}", "logprob_token_ids")


def stream_options(body: SamplingFields) -> tuple[bool, bool]:
    """(usage at the end, usage in each chunk, only with the former). A whole answer has usage at the end."""
    options = body.stream_options
    if not body.stream:
        if options is not None:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        return True, False
    if options is None:
        return False, False
    final = bool(options.include_usage)
    return final, final and bool(options.continuous_usage_stats)


def sampling_params(body: GenerationFields, **own: Any) -> SamplingParams:
    """Parameters from the shared fields and from the endpoint's own; null means the default.

    Raises InvalidRequestError.
    """
    shared = (SamplingFields if isinstance(body, SamplingFields) else GenerationFields).model_fields
    sent = {name: getattr(body, name) for name in PARAMETERS if name in shared} | own
    sent["stop"], sent["form"] = body.stops, body.form
    if body.top_k == -1:
        sent["top_k"] = 0
    return SamplingParams(**{name: _in_tuples(value) for name, value in sent.items() if value is not None})


def _in_tuples(value: Any) -> Any:
    """Lists and objects of JSON as tuples, the engine's immutable form."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of choice `index`: seed + index, wrapped around at the ends of a signed 64-bit integer."""
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=(params.seed + index + MAX_SEED + 1) % (2 * (MAX_SEED + 1)) - MAX_SEED - 1)


def to_overrides(options: EnsembleOptions | None) -> Overrides:
    """Our extension in the engine's form."""
    if options is None:
        return Overrides()
    fusion, weighting = options.fusion, options.weighting
    return Overrides(
        members=None if options.members is None else tuple(options.members),
        weights=options.weights,
        weighting=None if weighting is None else _weighting(weighting),
        fusion=None if fusion is None else fusion.name,
        fusion_options=None if fusion is None else fusion.options,
        mode=None if options.mode is None else options.mode.name,
        mode_options=None if options.mode is None else options.mode.options,
        bounds=None if options.limits is None else CouncilBounds(**options.limits.model_dump()),
    )


def _weighting(choice: WeightingChoice) -> Weighting:
    return Weighting(choice.by) if choice.tau is None else Weighting(choice.by, choice.tau)

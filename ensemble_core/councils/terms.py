"""On which terms a council takes a request: what it refuses, and the limits that both agree on.

Does not know how a council is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ensemble_core.council_config import CouncilLimits
from ensemble_core.councils.book import Council
from ensemble_core.decoding.requests import Conversation, CouncilBounds, GenerationRequest, Overrides
from ensemble_core.errors import InvalidRequestError


def agreed(council: Council, requests: Sequence[GenerationRequest]) -> CouncilLimits:
    """The limits of each choice; the choices of one prompt share the request's."""
    limits = lowered(council.limits, requests[0].overrides.bounds)
    choices = max(Counter(request.group or request.request_id for request in requests).values())
    if council.cost.calls * choices > limits.max_calls and not _spares(council, limits, choices):
        raise InvalidRequestError(
            f"{'n' if choices > 1 else 'ensemble.limits'}: each choice of {council.name!r} needs up to "
            f"{council.cost.calls} calls, and a request may make {limits.max_calls} (limits.max_calls); ask for "
            "fewer choices",
            "n" if choices > 1 else "ensemble.limits",
        )
    tokens = limits.max_tokens // choices
    if tokens - council.cost.fixed < council.cost.writers:
        raise InvalidRequestError(
            f"ensemble.limits.max_tokens: {choices} choices of {council.cost.writers} calls share "
            f"{limits.max_tokens} tokens, of which {council.cost.fixed * choices} are set aside for short calls; "
            "ask for fewer choices, or allow more tokens",
            "ensemble.limits",
        )
    return limits.model_copy(update={"max_calls": limits.max_calls // choices, "max_tokens": tokens})


def _spares(council: Council, limits: CouncilLimits, choices: int) -> bool:
    """Whether the calls beyond the limit are only those that a discussion makes if some are left."""
    return council.config.kind == "discuss" and council.cost.writers * choices <= limits.max_calls


def lowered(limits: CouncilLimits, bounds: CouncilBounds | None) -> CouncilLimits:
    """The limits that a request asks for. Raises InvalidRequestError for one that is higher than configured."""
    if bounds is None:
        return limits
    asked = {name: value for name in ("max_calls", "max_tokens", "seconds") if (value := getattr(bounds, name))}
    for name, value in asked.items():
        if value > getattr(limits, name):
            raise InvalidRequestError(
                f"ensemble.limits.{name}: this council allows {getattr(limits, name):g} at most, got {value:g}; "
                "a request may only lower limits",
                "ensemble.limits",
            )
    return limits.model_copy(update=asked)


def check(request: GenerationRequest, council: Council) -> None:
    """Refuse what belongs to one model's tokens, and what a council does not have."""
    params, name = request.params, council.name
    one = f"{name!r} is a council, whose models have different tokens; send it to one of its models"
    for param, given in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("logprob_token_ids", params.logprob_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("prompt", isinstance(request.prompt, tuple)),
    ):
        if given:
            raise InvalidRequestError(f"{param}: {'token ids' if param == 'prompt' else 'this'}: {one}", param)
    if params.prompt_logprobs is not None:
        raise InvalidRequestError(
            f"prompt_logprobs: {name!r} is a council, which scores no prompts; ask one of its models",
            "prompt_logprobs",
        )
    if params.echo:
        raise InvalidRequestError(
            f"echo: {name!r} is a council, which scores no prompts; ask one of its models", "echo"
        )
    if replace(request.overrides, bounds=None) != Overrides():
        raise InvalidRequestError(
            f"ensemble: {name!r} is a council, for which a request may set limits and trace alone", "ensemble"
        )
    tools = request.prompt.tools if isinstance(request.prompt, Conversation) else None
    if tools is not None and tools.binds and not council.calls_tools:
        raise InvalidRequestError(
            f"tools: the answer of {name!r} comes of several texts, so it can call none; send tool_choice: none, or "
            "ask one of its models",
            "tools",
        )
    if council.config.kind == "discuss":
        _check_discussion(request, name)


def _check_discussion(request: GenerationRequest, name: str) -> None:
    params = request.params
    if params.logprobs is not None:
        raise InvalidRequestError(
            f"logprobs: the answer of {name!r} is put together from a discussion, so its tokens have none",
            "logprobs",
        )
    if params.form is not None:
        raise InvalidRequestError(
            f"{params.form.field}: the answer of {name!r} has the form of its discussion; leave it out",
            params.form.field,
        )
    if getattr(request.prompt, "continue_final", False):
        raise InvalidRequestError(
            f"continue_final_message: a discussion ({name!r}) begins with a question", "continue_final_message"
        )

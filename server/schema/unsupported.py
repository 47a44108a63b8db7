"""Parameters that the endpoints know but do not support: some are refused by name, others change nothing.

Invariant: an unsupported parameter that would change the answer is refused unless its value is neutral. null is
always neutral. The tables of docs/api.md list every name here with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ensemble_core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Refused:
    """A parameter that would change the answer. example: a refused value; neutral: the accepted values."""

    example: Any
    neutral: tuple[Any, ...] = ()
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A parameter that is accepted and does not change the answer."""

    example: Any
    why: str


_REFUSED: dict[str, Refused] = {
    "guided_whitespace_pattern": Refused(" ?", why="`structured_outputs` has `whitespace_pattern`"),
    "use_beam_search": Refused(True, (False,)),
    "length_penalty": Refused(2.0, (1,), "there is no beam search"),
    "logits_processors": Refused(["x"], ([],), "would run code"),
    "prompt_logprobs": Refused(1, why="`echo` with `logprobs` reports the same"),
    "logprob_token_ids": Refused([1, 2], ([],)),
    "truncate_prompt_tokens": Refused(10, why="a prompt that is too long is refused"),
    "return_tokens_as_token_ids": Refused(True, (False,), "`return_token_ids` has them"),
    "spaces_between_special_tokens": Refused(False, (True,)),
    "repetition_detection": Refused({"max_pattern_size": 3}),
    "thinking_token_budget": Refused(5, (-1,), "chat completions have it"),
    "cache_salt": Refused("salt", why="the cache has no such isolation"),
}
COMPLETION_REFUSED: dict[str, Refused] = _REFUSED | {
    "suffix": Refused("the end", ("",), "members cannot fill in the middle"),
    "prompt_embeds": Refused("AAAA", why="members have different embeddings"),
}
CHAT_REFUSED: dict[str, Refused] = {
    name: refused for name, refused in _REFUSED.items() if name != "thinking_token_budget"
} | {
    "functions": Refused([{"name": "f"}], ([],), "older form of `tools`"),
    "function_call": Refused({"name": "f"}, ("none", "auto"), "older form of `tool_choice`"),
    "modalities": Refused(["audio"], (["text"],)),
    "audio": Refused({"voice": "x"}),
    "prediction": Refused({"type": "content"}),
    "web_search_options": Refused({}),
    "moderation": Refused({"model": "x"}),
    "verbosity": Refused("low", ("medium",)),
    "add_special_tokens": Refused(True, (False,), "templates write their own"),
    "best_of": Refused(2, (1,), "completions have it"),
    "echo": Refused(True, (False,), "completions have it"),
    "chat_template": Refused("{{ messages }}", why="templates run code: set it in the server's YAML"),
    "documents": Refused([{"text": "x"}], ([],)),
    "mm_processor_kwargs": Refused({"x": 1}, ({},)),
    "prompt_logprobs": Refused(1, why="completions have `echo` with `logprobs`"),
}
COMPLETION_IGNORED: dict[str, Ignored] = {
    "truncation_side": Ignored("left", "nothing is truncated"),
    "return_token_offsets": Ignored(True, "belongs to routes that do not exist here"),
    "priority": Ignored(1, "first come, first served"),
    "request_id": Ignored("mine", "use the `X-Request-Id` header"),
    "kv_transfer_params": Ignored({}, "there is one server"),
    "ec_transfer_params": Ignored({}, "there is one server"),
    "guided_decoding_backend": Ignored("guidance", "there is one, llguidance"),
    "vllm_xargs": Ignored({"x": 1}, "there are no such extensions"),
}
CHAT_IGNORED: dict[str, Ignored] = COMPLETION_IGNORED | {
    "metadata": Ignored({"a": "b"}, "nothing is stored"),
    "store": Ignored(True, "nothing is stored"),
    "service_tier": Ignored("flex", "there is one tier"),
    "safety_identifier": Ignored("me", "nothing is kept about users"),
    "prompt_cache_key": Ignored("key", "would affect speed only"),
    "prompt_cache_options": Ignored({}, "would affect speed only"),
    "prompt_cache_retention": Ignored("24h", "would affect speed only"),
}


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON: False is not 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def refuse_unsupported(body: Mapping[str, Any], refused: Mapping[str, Refused]) -> None:
    """Raise InvalidRequestError for the first parameter whose value would change the answer."""
    for name, value in body.items():
        found = refused.get(name)
        if found is None or value is None or any(_same(value, each) for each in found.neutral):
            continue
        why = f" ({found.why})" if found.why else ""
        allowed = " or ".join([*map(json.dumps, found.neutral), "null"])
        raise InvalidRequestError(f"{name} is not supported{why}; leave it out or send {allowed}", name)

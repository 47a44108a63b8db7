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
    "spaces_between_special_tokens": Refused(False, (True,)),
    "repetition_detection": Refused({"max_pattern_size": 3}),
    "thinking_token_budget": Refused(5, (-1,), "chat completions have it"),
    "watermarking": Refused(True, (False,)),
}
COMPLETION_REFUSED: dict[str, Refused] = _REFUSED | {
    "suffix": Refused("the end", ("",), "members cannot fill in the middle"),
    "truncation_side": Refused("right", ("left",), "the end of a prompt is kept"),
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
    "media_io_kwargs": Refused({"image": {"x": 1}}, ({},)),
    "prompt_token_ids": Refused([1, 2], why="completions take ids as `prompt`"),
    "return_prompt_text": Refused(True, (False,), "`return_token_ids` and /detokenize tell it"),
    "truncate_prompt_tokens": Refused(10, why="completions have it; a conversation is not cut"),
}
COMPLETION_IGNORED: dict[str, Ignored] = {
    "return_token_offsets": Ignored(True, "belongs to routes that do not exist here"),
    "return_mm_kwargs": Ignored(False, "belongs to routes that do not exist here"),
    "routed_experts_prompt_start": Ignored(1, "answers have no routing of experts"),
    "session_id": Ignored("mine", "nothing is kept about sessions"),
    "stream_interval": Ignored(5, "a chunk has what a step wrote"),
    "request_id": Ignored("mine", "use the `X-Request-Id` header"),
    "kv_transfer_params": Ignored({}, "there is one server"),
    "ec_transfer_params": Ignored({}, "there is one server"),
    "guided_decoding_backend": Ignored("guidance", "there is one, llguidance"),
    "vllm_xargs": Ignored({"x": 1}, "there are no such extensions"),
}
CHAT_IGNORED: dict[str, Ignored] = COMPLETION_IGNORED | {
    "truncation_side": Ignored("left", "nothing is truncated"),
    "metadata": Ignored({"a": "b"}, "nothing is stored"),
    "store": Ignored(True, "nothing is stored"),
    "service_tier": Ignored("flex", "there is one tier"),
    "safety_identifier": Ignored("me", "nothing is kept about users"),
    "prompt_cache_key": Ignored("key", "would affect speed only"),
    "prompt_cache_options": Ignored({}, "would affect speed only"),
    "prompt_cache_retention": Ignored("24h", "would affect speed only"),
}

_STATELESS = "nothing is stored; send the conversation as `input`"
RESPONSE_REFUSED: dict[str, Refused] = {
    name: refused for name, refused in _REFUSED.items() if name != "thinking_token_budget"
} | {
    "previous_response_id": Refused("resp_1", why=_STATELESS),
    "previous_response": Refused({"id": "resp_1"}, why=_STATELESS),
    "previous_input_messages": Refused([{"role": "user"}], ([],), _STATELESS),
    "conversation": Refused("conv_1", why=_STATELESS),
    "prompt": Refused({"id": "pmpt_1"}, why="no prompts are stored; send `instructions` and `input`"),
    "background": Refused(True, (False,), "nothing is stored; use `stream`"),
    "context_management": Refused([{"type": "compaction"}], ([],), "`truncation` shortens the input"),
    "moderation": Refused({"model": "x"}),
    "access_programs": Refused({"cyber": "standard"}, ({},)),
    "prompt_cache_options": Refused(
        {"prewarm": True}, ({}, {"mode": "implicit"}, {"mode": "explicit"}), "every prompt is answered"
    ),
    "n": Refused(2, (1,), "an answer is one text; chat completions have it"),
    "messages": Refused([{"role": "user", "content": "x"}], why="this endpoint takes `input`"),
    "max_tokens": Refused(5, why="this endpoint takes `max_output_tokens`"),
    "max_completion_tokens": Refused(5, why="this endpoint takes `max_output_tokens`"),
    "response_format": Refused({"type": "json_object"}, ({"type": "text"},), "this endpoint takes `text.format`"),
    "guided_json": Refused({"type": "object"}, why="older name of `structured_outputs`"),
    "guided_regex": Refused("a+", why="older name of `structured_outputs`"),
    "guided_choice": Refused(["a", "b"], why="older name of `structured_outputs`"),
    "guided_grammar": Refused('root ::= "x"', why="older name of `structured_outputs`"),
    "logprobs": Refused(True, (False,), "`include` asks for them"),
    "logprob_token_ids": Refused([1, 2], ([],), "chat completions have it"),
    "prompt_logprobs": Refused(1, why="completions have `echo` with `logprobs`"),
    "reasoning_effort": Refused("high", ("none",), "this endpoint takes `reasoning.effort`"),
    "verbosity": Refused("low", ("medium",), "this endpoint takes `text.verbosity`"),
    "return_token_ids": Refused(True, (False,), "chat completions have it"),
    "echo": Refused(True, (False,), "completions have it"),
    "best_of": Refused(2, (1,), "completions have it"),
    "enable_response_messages": Refused(True, (False,)),
    "mm_processor_kwargs": Refused({"x": 1}, ({},)),
    "chat_template": Refused("{{ messages }}", why="templates run code: set it in the server's YAML"),
    "chat_template_kwargs": Refused({"x": 1}, ({},)),
}
RESPONSE_IGNORED: dict[str, Ignored] = COMPLETION_IGNORED | {
    "truncation_side": Ignored("left", "`truncation` leaves out the oldest turns"),
    "store": Ignored(True, "nothing is stored; the answer says `store: false`"),
    "service_tier": Ignored("flex", "there is one tier"),
    "safety_identifier": Ignored("me", "nothing is kept about users"),
    "prompt_cache_key": Ignored("key", "would affect speed only"),
    "prompt_cache_retention": Ignored("24h", "would affect speed only"),
    "max_tool_calls": Ignored(3, "counts calls of built-in tools, and none are served"),
    "image": Ignored({"context_compression": "auto"}, "there are no images"),
}

_OLDER = "chat completions have it"
MESSAGE_REFUSED: dict[str, Refused] = _REFUSED | {
    "container": Refused("container_1", why="nothing runs here but models"),
    "mcp_servers": Refused([{"url": "x"}], ([],), "nothing runs here but models"),
    "context_management": Refused({"edits": [{}]}, ({},), "messages come as they are"),
    "diagnostics": Refused({"x": 1}, ({},)),
    "speed": Refused("fast", ("standard",), "there is one speed"),
    "functions": Refused([{"name": "f"}], ([],), "this endpoint takes `tools`"),
    "max_completion_tokens": Refused(5, why="this endpoint takes `max_tokens`"),
    "response_format": Refused({"type": "json_object"}, ({"type": "text"},), "`output_config.format` has schemas"),
    "guided_json": Refused({"type": "object"}, why=_OLDER),
    "guided_regex": Refused("a+", why=_OLDER),
    "guided_choice": Refused(["a", "b"], why=_OLDER),
    "guided_grammar": Refused('root ::= "x"', why=_OLDER),
    "n": Refused(2, (1,), _OLDER),
    "logprobs": Refused(True, (False,), _OLDER),
    "top_logprobs": Refused(2, (0,), _OLDER),
    "logprob_token_ids": Refused([1, 2], ([],), _OLDER),
    "return_token_ids": Refused(True, (False,), _OLDER),
    "stream_options": Refused({"include_usage": True}, ({},), "streams always have usage"),
    "chat_template": Refused("{{ messages }}", why="templates run code: set it in the server's YAML"),
    "chat_template_kwargs": Refused({"x": 1}, ({},)),
}
MESSAGE_IGNORED: dict[str, Ignored] = COMPLETION_IGNORED | {
    "metadata": Ignored({"user_id": "me"}, "nothing is kept about users"),
    "service_tier": Ignored("auto", "there is one tier"),
    "cache_control": Ignored({"type": "ephemeral"}, "would affect speed only"),
    "inference_geo": Ignored("eu", "there is one server"),
    "user_profile_id": Ignored("me", "nothing is kept about users"),
    "workspace_id": Ignored("mine", "nothing is kept about users"),
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

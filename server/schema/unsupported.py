"""What the endpoints know of and do not do: parameters that are refused by name, and those that change nothing.

Invariant: a parameter that would change the answer and is not supported is refused unless its value is neutral.
null is neutral for all of them. docs/api.md lists every name here with its reason; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ensemble_core.errors import InvalidRequestError

Neutral = Mapping[str, tuple[Any, ...]]  # parameter -> the values that change nothing

_BOTH: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
COMPLETION_NEUTRAL: Neutral = _BOTH | {
    "prompt_embeds": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
CHAT_NEUTRAL: Neutral = _BOTH | {
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Known, accepted, and without effect on the answer.
_BOTH_IGNORED = frozenset(
    {
        "ec_transfer_params",
        "kv_transfer_params",
        "priority",
        "request_id",
        "return_token_offsets",
        "truncation_side",
        "vllm_xargs",
    }
)
COMPLETION_IGNORED = _BOTH_IGNORED
CHAT_IGNORED = _BOTH_IGNORED | {
    "include_reasoning",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
}


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON: False is not 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def refuse_unsupported(body: Mapping[str, Any], neutral: Neutral) -> None:
    """Raise InvalidRequestError for the first parameter whose value would change the answer."""
    for name, value in body.items():
        if name not in neutral or value is None or any(_same(value, each) for each in neutral[name]):
            continue
        allowed = " or ".join([*(json.dumps(each) for each in neutral[name]), "null"])
        raise InvalidRequestError(f"{name} is not supported; leave it out or send {allowed}", name)

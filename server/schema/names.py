"""The names of all fields that bodies may have: what a log line may say of a refused body.

A body's own keys are the client's text. A name of this set is ours, wherever it appears in a path.
"""

from __future__ import annotations

from functools import cache
from itertools import takewhile
from typing import Any

from pydantic import BaseModel

from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.messages import MessagesRequest
from server.schema.responses import ResponseRequest
from server.schema.tokenizers import DetokenizeRequest, TokenizeRequest
from server.schema.unsupported import (
    CHAT_IGNORED,
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    MESSAGE_IGNORED,
    MESSAGE_REFUSED,
    RESPONSE_IGNORED,
    RESPONSE_REFUSED,
)

BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    ChatRequest,
    ResponseRequest,
    MessagesRequest,
    TokenizeRequest,
    DetokenizeRequest,
)
_MAX_INDEX_DIGITS = 7


@cache
def declared_names() -> frozenset[str]:
    """The names of the fields of all bodies and of the objects in them, refused and ignored parameters included."""
    names = {*COMPLETION_REFUSED, *CHAT_REFUSED, *CHAT_IGNORED, *RESPONSE_REFUSED, *RESPONSE_IGNORED}
    names |= {*MESSAGE_REFUSED, *MESSAGE_IGNORED}
    for body in BODIES:
        names |= properties(body.model_json_schema())
    return frozenset(names)


def properties(schema: dict[str, Any]) -> set[str]:
    """The names of the properties of a JSON schema and of its definitions."""
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


def declared_part(path: str | None) -> str | None:
    """The path up to its first part that is neither a declared name nor an index; None if nothing is left."""
    if path is None:
        return None
    return ".".join(takewhile(_is_ours, path.split("."))) or None


def _is_ours(part: str) -> bool:
    index = part.isascii() and part.isdecimal() and len(part) <= _MAX_INDEX_DIGITS
    return index or part in declared_names()

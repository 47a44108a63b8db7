"""Tools: functions that a model may call, what a request says of them, and the calls that come of it.

Invariant: these are values; they are checked where they are made. Does not know how a model writes a call
(`call_forms`), nor what reads one (`calls`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ensemble_core.errors import InvalidRequestError, quoted

Message = Mapping[str, Any]
"""A message as templates take it: role, content; an assistant's `tool_calls`, `reasoning` and `reasoning_content`; a
tool's `tool_call_id` and `name`."""

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NO_PARAMETERS = '{"type": "object", "properties": {}}'
# Keywords that may name further properties, so that an object with one of them is not closed.
_OPENING = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "$ref", "$dynamicRef"}
    | {"allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies"}
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call. parameters: the JSON schema of its arguments, as text of an object."""

    name: str
    description: str = ""
    parameters: str = NO_PARAMETERS

    def __post_init__(self) -> None:
        try:
            schema = json.loads(self.parameters)
        except (ValueError, RecursionError):
            schema = None
        if not NAME.fullmatch(self.name) or not isinstance(schema, dict):
            raise InvalidRequestError(
                f"tools: a tool has a name of 1 to 64 letters, digits, _ and -, and the JSON text of a schema, got "
                f"{quoted(self.name)} and {quoted(self.parameters)}",
                "tools",
            )

    def described(self) -> dict[str, Any]:
        """The tool as templates take it; some fail where a key is missing."""
        function = {"name": self.name, "description": self.description, "parameters": json.loads(self.parameters)}
        return {"type": "function", "function": function}

    def arguments(self) -> dict[str, Any]:
        """The schema that arguments follow: an object in any case.

        Where it lists properties and does not speak of others, there are none: a function takes no unknown arguments.
        """
        schema: dict[str, Any] = {"type": "object"} | json.loads(self.parameters)
        if "properties" in schema and not _OPENING & schema.keys():
            schema["additionalProperties"] = False
        return schema


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request and how they may be used.

    choice: auto: text or calls; required: calls; none: text, though the tools are shown. allowed: the names that may
    be called, None: all. parallel: several calls in one answer.
    """

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required", "none"] = "auto"
    allowed: tuple[str, ...] | None = None
    parallel: bool = True

    @property
    def binds(self) -> bool:
        """Whether calls may come."""
        return self.choice != "none"

    @property
    def callable(self) -> list[tuple[int, Tool]]:
        """The tools that may be called, each with its place in the request."""
        return [
            (rank, tool)
            for rank, tool in enumerate(self.tools)
            if self.allowed is None or tool.name in self.allowed
        ]


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News of one call. Its first piece has the name and the id; the arguments of all pieces join to JSON text."""

    index: int
    arguments: str = ""
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call. arguments: JSON text; it is cut where the answer was."""

    call_id: str
    name: str
    arguments: str


def merged(pieces: Iterable[CallPiece]) -> list[CallPiece]:
    """One piece for each call, in order."""
    found: dict[int, CallPiece] = {}
    for piece in pieces:
        before = found.get(piece.index)
        found[piece.index] = (
            piece
            if before is None
            else CallPiece(piece.index, before.arguments + piece.arguments, before.name, before.call_id)
        )
    return list(found.values())


def folded(pieces: Iterable[CallPiece]) -> list[ToolCall]:
    """The calls that all pieces of an answer make."""
    return [ToolCall(each.call_id or "", each.name or "", each.arguments) for each in merged(pieces)]

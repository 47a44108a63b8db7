"""Tools in chat bodies: what may be called, the calls of earlier turns, and the calls of an answer.

Bounds are checked here, before anything is compiled. Does not know how models write calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, model_validator

from ensemble_core.errors import InvalidRequestError, quoted, shortened
from ensemble_core.text.tools import NAME, NO_PARAMETERS, Tool, ToolUse
from server.schema.json_values import Strict, Text, optional, text

MAX_TOOLS = 128
MAX_TOOL_TEXT = 262_144  # characters of all tools as JSON
MAX_DEPTH = 64


def bounded_tools(value: object) -> object:
    """The tools as they are; a list that is too large is not looked at."""
    if isinstance(value, list):
        if len(value) > MAX_TOOLS:
            raise ValueError(f"takes up to {MAX_TOOLS} tools, got {len(value)}")
        try:
            size = len(json.dumps(value, ensure_ascii=False))
        except RecursionError:
            raise ValueError(f"is nested over {MAX_DEPTH} levels deep") from None
        if size > MAX_TOOL_TEXT:
            raise ValueError(f"takes up to {MAX_TOOL_TEXT} characters of JSON, got {size}; send fewer tools")
    return value


def function_name(value: object) -> str:
    """A name that a function may have."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError("must be 1 to 64 letters, digits, _ and -")
    return value


def object_schema(value: object) -> dict[str, Any]:
    """The schema of an object, not nested too deeply."""
    if not isinstance(value, dict):
        raise ValueError('must be a JSON schema, for example {"type": "object", "properties": {}}')
    if value.get("type", "object") != "object":
        raise ValueError('must be a JSON schema of type "object", since arguments have names')
    if depth(value) > MAX_DEPTH:
        raise ValueError(f"is nested over {MAX_DEPTH} levels deep")
    text(json.dumps(value, ensure_ascii=False))
    return value


def depth(value: object) -> int:
    """Levels of objects and lists, counted up to one over the bound."""
    level, inner = 0, [value]
    while inner and level <= MAX_DEPTH:
        inner = [child for each in inner for child in _children(each)]
        level += bool(inner)
    return level


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def call_arguments(value: object) -> dict[str, Any]:
    """Arguments as templates take them; a client sends JSON text."""
    try:
        found = json.loads(text(value) or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON text of an object: {error}") from error
    if not isinstance(found, dict) or depth(found) > MAX_DEPTH:
        raise ValueError(f"must be JSON text of an object, not over {MAX_DEPTH} levels deep")
    text(json.dumps(found, ensure_ascii=False))
    return found


FunctionName = Annotated[str, PlainValidator(function_name, json_schema_input_type=str)]


class FunctionSpec(Strict):
    """A function that may be called."""

    name: FunctionName = Field(description="1 to 64 letters, digits, `_` and `-`; each tool has its own.")
    description: Text | None = Field(None, description="What it does and when to call it, for the model.")
    parameters: Annotated[
        dict[str, Any] | None,
        PlainValidator(optional(object_schema), json_schema_input_type=dict[str, Any] | None),
    ] = Field(None, description="JSON schema of its arguments, an object; none if not sent.")
    strict: bool | None = Field(None, description="Accepted; the schema always binds.")

    def tool(self) -> Tool:
        """The function in the engine's form."""
        schema = NO_PARAMETERS if self.parameters is None else json.dumps(self.parameters, ensure_ascii=False)
        return Tool(self.name, self.description or "", schema)


class FunctionTool(Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionSpec


Tools = Annotated[
    list[FunctionTool] | None, BeforeValidator(bounded_tools, json_schema_input_type=list[FunctionTool] | None)
]


class FunctionRef(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """A tool by its name."""

    type: Literal["function"] = "function"
    function: FunctionRef


class AllowedTools(Strict):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)


_WORDS = ("none", "auto", "required")


def _choice(value: object) -> object:
    """`"auto"` is short for `{"type": "auto"}`; as in vLLM, `{"function": ...}` needs no type."""
    if isinstance(value, str):
        if value not in _WORDS:
            raise ValueError(f"must be one of {', '.join(_WORDS)}, or an object that names functions")
        return {"type": value}
    if isinstance(value, dict) and value.get("function") is not None:
        return {"type": "function"} | value
    return value


class ToolChoice(Strict):
    """Whether calls may come, must come, and of which tools."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: FunctionRef | None = Field(None, description="With type function: the one that must be called.")
    allowed_tools: AllowedTools | None = Field(
        None, description="With type allowed_tools: those that may be called."
    )

    @model_validator(mode="after")
    def _named_where_needed(self) -> ToolChoice:
        for name in ("function", "allowed_tools"):
            if (self.type == name) != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be sent with type {name}, and only with it")
        return self

    @property
    def mode(self) -> Literal["none", "auto", "required"]:
        """What becomes of the tools that may be called."""
        if self.type == "allowed_tools" and self.allowed_tools is not None:
            return self.allowed_tools.mode
        return "required" if self.type in ("required", "function") else "none" if self.type == "none" else "auto"

    @property
    def names(self) -> dict[str, str]:
        """The tools that may be called: path -> name; empty: all."""
        if self.function is not None:
            return {"tool_choice.function.name": self.function.name}
        allowed = self.allowed_tools.tools if self.allowed_tools is not None else []
        return {
            f"tool_choice.allowed_tools.tools.{rank}.function.name": each.function.name
            for rank, each in enumerate(allowed)
        }


ToolChoiceField = Annotated[
    ToolChoice | None, BeforeValidator(_choice, json_schema_input_type=str | ToolChoice | None)
]


class CalledFunction(Strict):
    """What was called."""

    name: FunctionName
    arguments: Annotated[dict[str, Any], PlainValidator(call_arguments, json_schema_input_type=str)] = Field(
        description="JSON text of an object."
    )


class EarlierCall(Strict):
    """A call of an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class FunctionReply(BaseModel):
    """The function that is called. arguments: JSON text; in a stream, a piece of it."""

    name: str = ""
    arguments: str


class ToolCallReply(BaseModel):
    """A call of an answer."""

    id: str
    type: Literal["function"]
    function: FunctionReply


class ToolCallDelta(BaseModel):
    """News of a call in a stream. Its first piece has id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionReply


def to_tool_use(
    tools: Sequence[FunctionTool], choice: ToolChoice | None, parallel: bool | None = None
) -> ToolUse | None:
    """Tools in the engine's form; None: there are none. Raises InvalidRequestError.

    parallel: as sent. If not sent, a function that is chosen by name is called once, as clients that wait for its
    arguments expect.
    """
    found = tuple(each.function.tool() for each in tools)
    _check(found)
    mode, chosen = ("auto", {}) if choice is None else (choice.mode, choice.names)
    if not found and (chosen or mode == "required"):
        raise InvalidRequestError("tool_choice asks for a call, and no tools were sent; send some", "tool_choice")
    known = [tool.name for tool in found]
    for where, name in chosen.items():
        if name not in known:
            raise InvalidRequestError(
                f"{where}: {shortened(name)} is not among the tools, which are {quoted(known)}", where
            )
    allowed = tuple(dict.fromkeys(chosen.values())) or None
    several = (choice is None or choice.type != "function") if parallel is None else parallel
    return ToolUse(found, mode, allowed, several) if found else None


def _check(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for rank, tool in enumerate(tools):
        if tool.name in seen:
            where = f"tools.{rank}.function.name"
            raise InvalidRequestError(f"{where}: {tool.name!r} names two tools; give each its own name", where)
        seen.add(tool.name)

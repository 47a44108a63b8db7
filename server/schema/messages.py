"""The body of /v1/messages, Anthropic's form of a chat completion.

Blocks that belong to what is not served (images, documents, tools that run elsewhere) are refused by name. Does not
know how blocks become messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo, model_validator

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import PARAMETERS
from ensemble_core.errors import InvalidRequestError, quoted
from ensemble_core.text.variables import Effort
from server.schema.forms import StructuredOutputs, of_outputs, of_schema, only
from server.schema.json_values import Strict, Text, of_types, optional, text
from server.schema.response_values import neutral
from server.schema.sampling import GenerationFields
from server.schema.tools import (
    MAX_TOOLS,
    FunctionName,
    FunctionRef,
    FunctionSpec,
    FunctionTool,
    ToolChoice,
    bounded_tools,
    call_arguments,
    function_name,
    object_schema,
)
from server.schema.unsupported import MESSAGE_IGNORED, MESSAGE_REFUSED, Ignored, Refused

_BLOCKS = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


def _block_type(value: object) -> str:
    if value not in _BLOCKS:
        raise ValueError(f"blocks of type {quoted(value)} are not supported; send {', '.join(_BLOCKS)}")
    return str(value)


def _blocks(value: object) -> object:
    """A text is short for one block."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _texts(value: object) -> str:
    """Text, or text blocks joined by line breaks."""
    blocks = _blocks(value)
    if not isinstance(blocks, list) or not all(isinstance(each, dict) for each in blocks):
        raise ValueError("must be a string or a list of text blocks")
    for each in blocks:
        if each.get("type") != "text":
            raise ValueError(f"blocks of type {quoted(each.get('type'))} are not supported here; send text alone")
    return "\n".join(text(each.get("text")) for each in blocks)


def _plain(value: object) -> str:
    return text(value)


def _input(value: object) -> dict[str, Any]:
    """Arguments as templates take them."""
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    try:
        return call_arguments(json.dumps(value))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _result(value: object, info: ValidationInfo) -> str | None:
    """What a call returned, which may be nothing."""
    found: str | None = of_types(_texts, "tool_result")("" if value is None else value, info)
    return found


class MessageBlock(Strict):
    """A piece of a message: text, a call, what a call returned, or what an assistant thought before."""

    type: Annotated[str, PlainValidator(_block_type, json_schema_input_type=str)]
    text: Annotated[
        str | None,
        PlainValidator(of_types(_plain, "text"), json_schema_input_type=str | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a text.")
    id: Annotated[
        str | None,
        PlainValidator(of_types(_plain, "tool_use"), json_schema_input_type=str | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a call.")
    name: Annotated[
        str | None,
        PlainValidator(of_types(function_name, "tool_use"), json_schema_input_type=str | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a call: the tool.")
    input: Annotated[
        dict[str, Any] | None,
        PlainValidator(of_types(_input, "tool_use"), json_schema_input_type=dict[str, Any] | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a call: its arguments.")
    tool_use_id: Annotated[
        str | None,
        PlainValidator(of_types(_plain, "tool_result"), json_schema_input_type=str | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a result: its call.")
    content: Annotated[
        str | None,
        PlainValidator(_result, json_schema_input_type=str | list[dict[str, Any]] | None),
        Field(validate_default=True),
    ] = Field(None, description="Of a result: text, or text blocks.")

    thinking: Annotated[
        str | None,
        PlainValidator(of_types(_plain, "thinking"), json_schema_input_type=str | None),
        Field(validate_default=True),
    ] = Field(None, description="Of thinking; redacted thinking is not read.")


class TurnOfMessages(Strict):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[MessageBlock],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_blocks, json_schema_input_type=str | list[MessageBlock]),
    ]


def _tool_type(value: object) -> object:
    if value not in (None, "custom"):
        raise ValueError(f"tools of type {quoted(value)} are not served; send tools with an input_schema")
    return value


class ToolOfMessages(Strict):
    """A tool of the client's."""

    type: Annotated[str | None, PlainValidator(_tool_type, json_schema_input_type=Literal["custom"] | None)] = None
    name: FunctionName
    description: Text | None = Field(None, description="What it does and when to call it, for the model.")
    input_schema: Annotated[
        dict[str, Any], PlainValidator(object_schema, json_schema_input_type=dict[str, Any])
    ] = Field(description="JSON schema of its arguments, an object.")
    strict: bool | None = Field(None, description="Accepted; the schema always binds.")
    defer_loading: Annotated[bool | None, neutral(False)] = Field(None, description="Only false.")

    def nested(self) -> FunctionTool:
        """The tool in chat's form."""
        spec = FunctionSpec(name=self.name, description=self.description, parameters=self.input_schema)
        return FunctionTool(type="function", function=spec)


_MODES = {"auto": "auto", "any": "required", "tool": "function", "none": "none"}


class ChoiceOfMessages(Strict):
    """Whether calls may come, must come, and of which tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = Field(None, description="With type tool: the one that must be called.")
    disable_parallel_tool_use: bool | None = Field(None, description="true: one call in an answer at most.")

    @model_validator(mode="after")
    def _named_where_needed(self) -> ChoiceOfMessages:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name must be sent with type tool, and only with it")
        return self

    def nested(self) -> ToolChoice:
        """The choice in chat's form."""
        function = None if self.name is None else FunctionRef(name=self.name)
        return ToolChoice.model_validate({"type": _MODES[self.type], "function": function})


class FormatOfMessages(Strict):
    """What the text must be."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema; it always binds.")


class ThinkingConfig(Strict):
    """Whether and how much the model thinks first."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="With type enabled: as chat's thinking_token_budget."
    )

    @model_validator(mode="after")
    def _budget_where_needed(self) -> ThinkingConfig:
        if self.budget_tokens is not None and self.type != "enabled":
            raise ValueError("budget_tokens is only allowed with type enabled")
        return self


class OutputConfig(Strict):
    """The text of the answer."""

    format: FormatOfMessages | None = Field(None, description="json_schema.")
    effort: Effort | None = Field(None, description="As chat's reasoning_effort.")


class MessagesBody(GenerationFields):
    """What the answer to messages depends on, but for its length."""

    refused: ClassVar[Mapping[str, Refused]] = MESSAGE_REFUSED
    ignored: ClassVar[Mapping[str, Ignored]] = MESSAGE_IGNORED

    messages: list[TurnOfMessages] = Field(
        min_length=1,
        fail_fast=True,
        description="text, or blocks `text`, `tool_use`, `tool_result`, `thinking`; other "
        "blocks: 400; a last message of the assistant is gone on with",
        examples=[[{"role": "user", "content": [{"type": "text", "text": "Bye!"}]}]],
    )
    system: Annotated[
        str | None,
        PlainValidator(optional(_texts), json_schema_input_type=str | list[dict[str, Any]] | None),
    ] = Field(None, description="text, or text blocks, before the messages", examples=["Be brief."])
    stop_sequences: list[Text] | None = Field(
        None,
        max_length=PARAMETERS["stop"].most,
        fail_fast=True,
        description="as `stop`, which is its name elsewhere; send one of them",
        examples=[["END"]],
    )
    tools: Annotated[
        list[ToolOfMessages] | None,
        BeforeValidator(bounded_tools, json_schema_input_type=list[ToolOfMessages] | None),
    ] = Field(
        None,
        description=f"up to {MAX_TOOLS} tools with an `input_schema`; tools of Anthropic's own types: 400",
        examples=[[{"name": "f", "input_schema": {"type": "object"}}]],
    )
    tool_choice: ChoiceOfMessages | None = Field(
        None,
        description="`auto` if not sent, `any`, `tool` by name, `none`; `disable_parallel_tool_use`",
        examples=[{"type": "none"}],
    )
    output_config: OutputConfig | None = Field(
        None,
        description="`format`: `json_schema`, which always binds; `effort`: as chat's `reasoning_effort`",
        examples=[{"format": {"type": "json_schema", "schema": {"type": "object"}}}],
    )
    thinking: ThinkingConfig | None = Field(
        None,
        description="`enabled` with `budget_tokens`, `adaptive`, or `disabled`, which is the effort `none`; "
        "`display` and signatures are not read",
        examples=[{"type": "enabled", "budget_tokens": 8}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="as in chat completions; not beside `output_config.format`", examples=[{"regex": "a+"}]
    )
    stream: bool | None = Field(None, description="send named events; there is no `[DONE]`", examples=[True])

    @property
    def form(self) -> TextForm | None:
        """What the text must be; None for free text. Raises InvalidRequestError."""
        return only([*_of_config(self.output_config), *of_outputs(self.structured_outputs)])

    @property
    def effort(self) -> Effort | None:
        """How much the model should reason, by the name of either field."""
        if self.output_config is not None and self.output_config.effort is not None:
            return self.output_config.effort
        return "none" if self.thinking is not None and self.thinking.type == "disabled" else None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, by either name. Raises InvalidRequestError for both."""
        if self.stop_sequences and self.stop:
            raise InvalidRequestError("stop is another name of stop_sequences; send one of them", "stop")
        return tuple(self.stop_sequences or super().stops)


class MessagesRequest(MessagesBody):
    """The body of POST /v1/messages."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "duo", "max_tokens": 32, "messages": [{"role": "user", "content": "Hello!"}]}
        }
    )

    max_tokens: int = Field(
        description="maximum number of tokens of the answer", examples=[5], json_schema_extra={"minimum": 1}
    )


class CountTokensRequest(MessagesBody):
    """The body of POST /v1/messages/count_tokens. What is no part of the prompt changes nothing."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "duo", "messages": [{"role": "user", "content": "Hello!"}]}}
    )


def _of_config(sent: OutputConfig | None) -> Iterator[TextForm]:
    if sent is not None and sent.format is not None:
        yield of_schema(sent.format.schema_, "output_config.format.schema")

"""The body of /v1/responses: input items, tools in their flat form, what the text must be.

Nothing is stored, so a conversation comes whole, as items. Items, tools and values that belong to what is not served
(stored conversations, built-in tools, files, images) are refused by name. Does not know how items become messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo, model_validator

from ensemble_core.decoding.forms import TextForm
from ensemble_core.errors import InvalidRequestError, quoted
from server.schema.forms import StructuredOutputs, of_outputs, of_schema, only
from server.schema.json_values import Strict, Text, of_types, optional, text
from server.schema.response_values import (
    LOGPROBS,
    IncludeField,
    MetadataField,
    ReasoningOptions,
    neutral,
)
from server.schema.sampling import GenerationFields, parameter
from server.schema.tools import (
    MAX_DEPTH,
    MAX_TOOLS,
    AllowedTools,
    FunctionName,
    FunctionRef,
    FunctionSpec,
    FunctionTool,
    NamedTool,
    ToolChoice,
    bounded_tools,
    call_arguments,
    depth,
    function_name,
)
from server.schema.unsupported import RESPONSE_IGNORED, RESPONSE_REFUSED, Ignored, Refused

_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> the field with its text
_THOUGHTS = {"reasoning_text": "text"}
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item_type(value: object) -> str:
    if value is None:
        return "message"
    if value == "item_reference":
        raise ValueError(
            "'item_reference' is not supported, since nothing is stored; send the items (store: false)"
        )
    if value not in _ITEMS:
        raise ValueError(f"items of type {quoted(value)} are not supported; send {', '.join(_ITEMS)}")
    return str(value)


def _role(value: object) -> str:
    if value not in ("user", "assistant", "system", "developer"):
        raise ValueError("must be user, assistant, system or developer")
    return str(value)


def _content(value: object, parts: Mapping[str, str] = _PARTS) -> str:
    """Text as it is, or text parts joined by line breaks."""
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_part(part, parts) for part in value)


def _content_of(value: object, info: ValidationInfo) -> str | None:
    """The text of a message, which must have one, or of reasoning, which may be encrypted."""
    if info.data.get("type") == "reasoning":
        return _content(value, _THOUGHTS) if value else None
    found: str | None = of_types(_content, "message")(value, info)
    return found


def _part(part: object, parts: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError('a part must be an object with a type, for example {"type": "input_text", "text": "..."}')
    if kind not in parts:
        raise ValueError(f"parts of type {quoted(kind)} are not supported; send {', '.join(parts)}")
    return text(part.get(parts[kind]))


def _field(check: Callable[[object], Any], *types: str, sent: Any = str) -> Any:
    return PlainValidator(of_types(check, *types), json_schema_input_type=sent | None)


class InputItem(Strict):
    """A message, a call of a function, what it returned, or a model's reasoning."""

    type: Annotated[
        str | None, PlainValidator(_item_type, json_schema_input_type=str | None), Field(validate_default=True)
    ] = Field(None, description="message if not sent; function_call, function_call_output, reasoning.")
    role: Annotated[str | None, _field(_role, "message"), Field(validate_default=True)] = Field(
        None, description="Of a message: user, assistant, system, or developer, treated as system."
    )
    content: Annotated[
        str | None,
        PlainValidator(_content_of, json_schema_input_type=str | list[dict[str, Any]] | None),
        Field(validate_default=True),
    ] = Field(
        None,
        description="Of a message: text, or parts of type input_text, output_text or refusal, joined by line breaks. "
        "Of reasoning: parts of type reasoning_text.",
    )
    call_id: Annotated[
        str | None, _field(text, "function_call", "function_call_output"), Field(validate_default=True)
    ] = Field(None, description="Of a call and of what it returned: the id that joins them.")
    name: Annotated[str | None, _field(function_name, "function_call"), Field(validate_default=True)] = Field(
        None, description="Of a call: the function."
    )
    arguments: Annotated[
        dict[str, Any] | None, _field(call_arguments, "function_call"), Field(validate_default=True)
    ] = Field(None, description="Of a call: JSON text of an object.")
    output: Annotated[
        str | None,
        _field(_content, "function_call_output", sent=str | list[dict[str, Any]]),
        Field(validate_default=True),
    ] = Field(None, description="What a call returned: text, or text parts.")

    @property
    def opens_turn(self) -> bool:
        """A conversation may begin with it."""
        return self.type == "message" and self.role != "assistant"


def _items(value: object) -> object:
    """`"Hi"` is short for one message of the user."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _tool_type(value: object) -> str:
    if value != "function":
        raise ValueError(f"tools of type {quoted(value)} are not served; send functions alone")
    return "function"


class OfFunctions(Strict):
    """What is about a function. Other kinds of tools run on OpenAI's side, or take text that is no JSON."""

    type: Annotated[str, PlainValidator(_tool_type, json_schema_input_type=Literal["function"])]


class FlatTool(FunctionSpec, OfFunctions):
    """A function that may be called."""

    defer_loading: Annotated[bool | None, neutral(False)] = Field(None, description="Only false.")
    async_: Annotated[bool | None, neutral(False)] = Field(None, alias="async", description="Only false.")
    allowed_callers: Annotated[list[str] | None, neutral(["direct"])] = Field(None, description="Only direct.")

    def nested(self) -> FunctionTool:
        """The tool in chat's form."""
        return FunctionTool(type="function", function=self)

    def told(self) -> dict[str, Any]:
        """The tool as the answer repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict is not False,
        }


class FlatToolRef(OfFunctions):
    """A function by its name."""

    name: FunctionName


_WORDS = ("none", "auto", "required")
_CHOICES = (*_WORDS, "function", "allowed_tools")


def _choice(value: object) -> object:
    """`"auto"` is short for `{"type": "auto"}`."""
    if isinstance(value, str):
        if value not in _WORDS:
            raise ValueError(f"must be one of {', '.join(_WORDS)}, or an object that names functions")
        return {"type": value}
    return value


def _choice_type(value: object) -> str:
    if value not in _CHOICES:
        raise ValueError(
            f"{quoted(value)} is not served; send function or allowed_tools, or one of {', '.join(_WORDS)}"
        )
    return str(value)


class FlatToolChoice(Strict):
    """Whether calls may come, must come, and of which tools."""

    type: Annotated[str, PlainValidator(_choice_type, json_schema_input_type=Literal["function", "allowed_tools"])]
    name: FunctionName | None = Field(None, description="With type function: the one that must be called.")
    mode: Literal["auto", "required"] | None = Field(None, description="With type allowed_tools.")
    tools: list[FlatToolRef] | None = Field(
        None, min_length=1, max_length=MAX_TOOLS, fail_fast=True, description="With type allowed_tools."
    )

    @model_validator(mode="after")
    def _named_where_needed(self) -> FlatToolChoice:
        for name, kind in (("name", "function"), ("mode", "allowed_tools"), ("tools", "allowed_tools")):
            if (self.type == kind) != (getattr(self, name) is not None):
                raise ValueError(f"{name} must be sent with type {kind}, and only with it")
        return self

    def nested(self) -> ToolChoice:
        """The choice in chat's form."""
        function = None if self.name is None else FunctionRef(name=self.name)
        allowed = None
        if self.mode is not None:
            named = [NamedTool(type="function", function=FunctionRef(name=each.name)) for each in self.tools or ()]
            allowed = AllowedTools(mode=self.mode, tools=named)
        return ToolChoice.model_validate({"type": self.type, "function": function, "allowed_tools": allowed})

    def told(self) -> str | dict[str, Any]:
        """The choice as the answer repeats it."""
        return self.type if self.type in _WORDS else self.model_dump(exclude_none=True)


def _schema(value: object) -> dict[str, Any]:
    """A schema that the answer can repeat: not too deep, and with text that UTF-8 can encode."""
    if not isinstance(value, dict) or depth(value) > MAX_DEPTH:
        raise ValueError(f"must be a JSON schema, not over {MAX_DEPTH} levels deep")
    text(json.dumps(value, ensure_ascii=False))
    return value


class TextFormat(Strict):
    """What the text must be."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = Field(None, description="Accepted; changes nothing.")
    description: Text | None = Field(None, description="Accepted; changes nothing.")
    schema_: Annotated[
        dict[str, Any] | None, PlainValidator(optional(_schema), json_schema_input_type=dict[str, Any] | None)
    ] = Field(None, alias="schema", description="With type json_schema.")
    strict: bool | None = Field(None, description="Accepted; the schema always binds.")

    @model_validator(mode="after")
    def _schema_where_needed(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema must be sent with type json_schema, and only with it")
        return self


class TextOptions(Strict):
    """The text of the answer."""

    format: TextFormat | None = Field(None, description="text if not sent; json_object, json_schema.")
    verbosity: Annotated[str | None, neutral("medium")] = Field(None, description="Only medium.")


class ResponseStreamOptions(Strict):
    """What a stream sends besides events."""

    include_obfuscation: bool | None = Field(
        None, description="Pad deltas with random letters, so that their sizes say less; false if not sent."
    )


class ResponseRequest(GenerationFields):
    """The body of POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": "duo", "input": "Hello!"}})
    refused: ClassVar[Mapping[str, Refused]] = RESPONSE_REFUSED
    ignored: ClassVar[Mapping[str, Ignored]] = RESPONSE_IGNORED

    input: Annotated[
        list[InputItem],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_items, json_schema_input_type=str | list[InputItem]),
    ] = Field(
        description="a text, or items: messages of text parts, `function_call`, `function_call_output`, "
        "`reasoning`; other items and parts: 400",
        examples=[[{"role": "user", "content": [{"type": "input_text", "text": "Bye!"}]}]],
    )
    instructions: Text | None = Field(
        None, description="a system message before the input", examples=["Be brief."]
    )
    max_output_tokens: int | None = Field(
        None,
        description="maximum number of tokens of the answer; the rest of the context if not sent",
        examples=[5],
        json_schema_extra={"minimum": 1},
    )
    text: TextOptions | None = Field(
        None,
        description="`format`: `text`, `json_object`, `json_schema`; the schema always binds; `verbosity`: only "
        "`medium`",
        examples=[{"format": {"type": "json_object"}}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="as in chat completions; not beside `text.format`", examples=[{"regex": "a+"}]
    )
    tools: Annotated[
        list[FlatTool] | None,
        BeforeValidator(bounded_tools, json_schema_input_type=list[FlatTool] | None),
    ] = Field(
        None,
        description=f"up to {MAX_TOOLS} functions; `custom`, `local_shell` and built-in tools: 400",
        examples=[[{"type": "function", "name": "f", "parameters": None, "strict": True}]],
    )
    tool_choice: Annotated[
        FlatToolChoice | None, BeforeValidator(_choice, json_schema_input_type=str | FlatToolChoice | None)
    ] = Field(
        None,
        description="`auto` if not sent; `none`, `required`, a function by name, or `allowed_tools`",
        examples=["none"],
    )
    parallel_tool_calls: bool | None = Field(
        None,
        description="true if not sent, but for a function by name; false: one call in an answer at most",
        examples=[False],
    )
    include: IncludeField = Field(
        None,
        description=f"`{LOGPROBS}`: log-probabilities of the text; `reasoning.encrypted_content` changes nothing; "
        "what belongs to built-in tools: 400",
        examples=[[LOGPROBS]],
    )
    top_logprobs: int | None = parameter("logprobs", f"alternatives for each token; only with `{LOGPROBS}`")
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="`disabled` if not sent: too long an input is a 400; `auto`: its oldest turns are left out",
        examples=["auto"],
    )
    metadata: MetadataField = Field(
        None, description="up to 16 texts by name; the answer repeats them", examples=[{"a": "b"}]
    )
    reasoning: ReasoningOptions | None = Field(
        None,
        description="`effort`: as chat's `reasoning_effort`; `summary`: only `auto`",
        examples=[{"effort": "low"}],
    )
    thinking_token_budget: int | None = parameter("thinking_token_budget")
    stream: bool | None = Field(
        None, description="send named events with `sequence_number`; there is no `[DONE]`", examples=[True]
    )
    stream_options: ResponseStreamOptions | None = Field(
        None,
        description="`include_obfuscation`; only with `stream`",
        examples=[{"include_obfuscation": True}],
    )

    @property
    def form(self) -> TextForm | None:
        """What the text must be; None for free text. Raises InvalidRequestError."""
        return only([*_of_text(self.text), *of_outputs(self.structured_outputs)])

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token to report; None: no log-probabilities. Raises InvalidRequestError."""
        included = LOGPROBS in (self.include or ())
        if self.top_logprobs and not included:
            raise InvalidRequestError(f'top_logprobs is only allowed with include: ["{LOGPROBS}"]', "top_logprobs")
        return (self.top_logprobs or 0) if included else None


def _of_text(sent: TextOptions | None) -> Iterator[TextForm]:
    wanted = None if sent is None else sent.format
    if wanted is None or wanted.type == "text":
        return
    if wanted.schema_ is None:
        yield TextForm("json", field="text.format")
    else:
        yield of_schema(wanted.schema_, "text.format.schema")

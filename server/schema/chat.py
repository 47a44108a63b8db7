"""Bodies and answers of /v1/chat/completions.

A message is flattened to role and text here. Each member's own template decides which tokens it becomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, model_validator
from pydantic_core import PydanticKnownError

from ensemble_core.decoding.requests import Conversation
from ensemble_core.errors import InvalidRequestError, quoted
from ensemble_core.text.tools import ToolUse
from ensemble_core.text.variables import Effort, TemplateVariables
from server.schema.json_values import Integer, Strict, Text, Variables, text
from server.schema.replies import PromptToken, Reply, Sent, TraceStep
from server.schema.sampling import SamplingFields, parameter
from server.schema.tools import (
    MAX_TOOLS,
    EarlierCall,
    ToolCallDelta,
    ToolCallReply,
    ToolChoiceField,
    Tools,
)
from server.schema.unsupported import CHAT_IGNORED, CHAT_REFUSED, Ignored, Refused

# Fields of a message that would change the answer; null and empty lists are neutral.
_MESSAGE_UNSUPPORTED = ("audio", "function_call")
_REASONING = ("reasoning", "reasoning_content")  # two names of one thing
_MISSING: Final = object()  # content that was not sent


class TextPart(BaseModel):
    """A piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


def _content(value: object, info: ValidationInfo) -> str:
    """Text as it is, or text parts joined by line breaks. Only calls and reasoning can stand without."""
    beside = any(info.data.get(name) for name in ("tool_calls", *_REASONING))
    if (value is None or value is _MISSING) and beside:
        return ""
    if value is _MISSING:
        raise PydanticKnownError("missing")
    if isinstance(value, str):
        return text(value)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_part(part) for part in value)


def _part(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError('a part must be an object with a type, for example {"type": "text", "text": "..."}')
    if part["type"] != "text":
        raise ValueError(f"parts of type {part['type'][:40]!r} are not supported; send text parts only")
    return text(part.get("text"))


def _call_id(value: object, info: ValidationInfo) -> str | None:
    """The id of a result's call; other messages have none."""
    of_tool = info.data.get("role") == "tool"
    if value is None and of_tool:
        raise PydanticKnownError("missing")
    if value is not None and not of_tool:
        raise ValueError("is of messages of role tool alone; leave it out")
    return None if value is None else text(value)


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is treated as system, the name that templates know."
    )
    tool_calls: list[EarlierCall] | None = Field(
        None, max_length=MAX_TOOLS, fail_fast=True, description="Calls of an assistant's turn."
    )
    tool_call_id: Annotated[
        str | None, PlainValidator(_call_id, json_schema_input_type=str | None), Field(validate_default=True)
    ] = Field(None, description="Of a message of role tool: the earlier call that it answers.")
    reasoning: Text | None = Field(
        None, description="What an assistant thought in an earlier turn; for templates that read it."
    )
    reasoning_content: Text | None = Field(None, description="Another name of `reasoning`.")
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None)] = Field(
        default_factory=lambda: cast(str, _MISSING),
        validate_default=True,
        description="Text, or text parts; parts are joined by line breaks. May be null beside `tool_calls` and "
        "`reasoning`.",
    )
    name: str | None = Field(None, description="Accepted; changes nothing.")

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: object) -> object:
        for name in _MESSAGE_UNSUPPORTED:
            if isinstance(value, dict) and value.get(name):
                raise ValueError(f"{name} is not supported in messages; leave it out")
        return value

    @model_validator(mode="after")
    def _calls_of_assistants(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are of messages of role assistant alone; leave them out")
        return self

    @model_validator(mode="after")
    def _reasoning_of_assistants(self) -> Message:
        given = {name: value for name in _REASONING if (value := getattr(self, name))}
        if given and self.role != "assistant":
            raise ValueError(f"{next(iter(given))} is of messages of role assistant alone; leave it out")
        if len(set(given.values())) > 1:
            raise ValueError("reasoning and reasoning_content are two names of one thing; send one of them")
        return self

    def flat(self) -> dict[str, Any]:
        """Role, text and what belongs to calls and to reasoning, in the form that templates take."""
        flat: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        if self.tool_calls:
            flat["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            flat["tool_call_id"] = self.tool_call_id
        if thought := self.reasoning or self.reasoning_content:
            flat |= dict.fromkeys(_REASONING, thought)
        return flat


def to_conversation(
    messages: list[Message],
    goes_on: bool,
    opens_turn: bool,
    tools: ToolUse | None = None,
    variables: TemplateVariables | None = None,
) -> Conversation:
    """Messages in the engine's form: continue the last message, or let the templates open the assistant's turn.

    Raises InvalidRequestError where the flags contradict each other or the messages, and for a result of no call.
    """
    if goes_on == opens_turn:
        raise InvalidRequestError(
            "continue_final_message: true needs add_generation_prompt: false, and the other way round",
            "continue_final_message" if goes_on else "add_generation_prompt",
        )
    if goes_on and messages[-1].role != "assistant":
        raise InvalidRequestError(
            "continue_final_message needs a last message of role 'assistant', got one of role "
            f"{messages[-1].role!r}",
            "continue_final_message",
        )
    if goes_on and messages[-1].tool_calls:
        raise InvalidRequestError(
            "continue_final_message: the last message ends with tool_calls, which nothing continues; leave it out",
            "continue_final_message",
        )
    return Conversation(tuple(_flattened(messages)), goes_on, tools, variables or TemplateVariables())


def _flattened(messages: list[Message]) -> Iterator[dict[str, Any]]:
    """Each message; results with the name of what was called, which some templates write."""
    called: dict[str, str] = {}
    for rank, message in enumerate(messages):
        flat = message.flat()
        called |= {call.id: call.function.name for call in message.tool_calls or ()}
        if message.tool_call_id is not None:
            where = f"messages.{rank}.tool_call_id"
            if message.tool_call_id not in called:
                raise InvalidRequestError(
                    f"{where}: {quoted(message.tool_call_id)} is no call of a message before; send the assistant's "
                    "message with its tool_calls, too",
                    where,
                )
            flat["name"] = called[message.tool_call_id]
        yield flat


class ChatRequest(SamplingFields):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "duo", "messages": [{"role": "user", "content": "Hello!"}]}}
    )
    refused: ClassVar[Mapping[str, Refused]] = CHAT_REFUSED
    ignored: ClassVar[Mapping[str, Ignored]] = CHAT_IGNORED

    messages: list[Message] = Field(
        min_length=1,
        fail_fast=True,
        description="text or a list of text parts; an assistant's `tool_calls` and their results (role `tool`), its "
        "`reasoning` or `reasoning_content`; other parts, `audio`, `function_call`: 400; `name` changes nothing",
        examples=[[{"role": "user", "content": [{"type": "text", "text": "Bye!"}]}]],
    )
    max_completion_tokens: Integer | None = Field(
        None,
        description="maximum number of tokens of each choice; the rest of the context if not sent",
        examples=[5],
        json_schema_extra={"minimum": 1},
    )
    max_tokens: Integer | None = Field(
        None, description="older name of `max_completion_tokens`", examples=[5], json_schema_extra={"minimum": 1}
    )
    logprobs: bool | None = Field(
        None, description="`{content: [{token, logprob, bytes, top_logprobs}]}`", examples=[True]
    )
    top_logprobs: Integer | None = parameter("logprobs", "alternatives for each token; only with `logprobs`")
    tools: Tools = Field(
        None,
        description=f"up to {MAX_TOOLS} functions that the answer may call; see [tools](tools.md)",
        examples=[[{"type": "function", "function": {"name": "f"}}]],
    )
    tool_choice: ToolChoiceField = Field(
        None,
        description="`auto` if not sent; `none`, `required`, a function by name, or `allowed_tools`; a grammar "
        "binds, so a call always follows its schema",
        examples=["none"],
    )
    parallel_tool_calls: bool | None = Field(
        None,
        description="true if not sent, but for a function by name; false: one call in an answer at most",
        examples=[False],
    )
    reasoning_effort: Effort | None = Field(
        None,
        description="for chat templates with a variable `reasoning_effort` or `enable_thinking` (false for `none` "
        "and `minimal`); where no member's has one: 400, but for `none`; see [reasoning](reasoning.md)",
        examples=["low"],
    )
    thinking_token_budget: int | None = parameter("thinking_token_budget")
    include_reasoning: bool | None = Field(
        None,
        description="true if not sent; false: do not send reasoning, which is written all the same",
        examples=[False],
    )
    chat_template_kwargs: Variables = Field(
        None,
        description="variables for every member's chat template; what none of them reads changes nothing; names that "
        "steer the rendering (`tokenize`, `tools`, ...): 400",
        examples=[{"enable_thinking": False}],
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="true if not sent; opens the assistant's turn; false only with `continue_final_message`",
        examples=[False],
    )
    continue_final_message: bool | None = Field(
        None,
        description="continue the last message, which must be the assistant's; needs `add_generation_prompt: false`",
        examples=[True],
    )


class ChatAlternative(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ChatAlternative):
    """A token of the answer and its likeliest alternatives."""

    top_logprobs: list[ChatAlternative]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[ChatToken]


class AssistantMessage(Sent):
    """The answer. Content is null where nothing but calls or reasoning was written."""

    always: ClassVar[tuple[str, ...]] = (
        "refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content",
    )  # fmt: skip

    role: Literal["assistant"]
    content: str | None
    reasoning: str | None = Field(None, description="What the model thought before; null without.")
    reasoning_content: str | None = Field(None, description="The same, by another name.")
    tool_calls: list[ToolCallReply] | None = Field(None, description="Calls of tools; not sent without.")
    refusal: None = Field(None, description="Always null, as the next ones.")
    annotations: None = None
    audio: None = None
    function_call: None = None


class Delta(BaseModel):
    """A piece of the answer. The first piece of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class _ChatBase(Sent):
    always: ClassVar[tuple[str, ...]] = ("token_ids",)

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    trace: list[TraceStep] | None = Field(None, description="With ensemble.trace: one entry for each token.")
    council: dict[str, Any] | None = Field(
        None, description="With ensemble.trace: a council's votes, scores, rounds."
    )


class ChatChoice(_ChatBase):
    """One choice."""

    message: AssistantMessage


class ChatPiece(_ChatBase):
    """A piece of one choice."""

    delta: Delta


class ChatCompletion(Reply):
    """A whole answer."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: list[dict[int, PromptToken] | None] | None = Field(
        None, description="With prompt_logprobs: a map of ids for each token, null for the first."
    )
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class ChatChunk(Reply):
    """One chunk of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")

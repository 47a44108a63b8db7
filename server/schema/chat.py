"""Bodies and answers of /v1/chat/completions.

A message is flattened to role and text here. Each member's own template decides which tokens it becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from ensemble_core.decoding.requests import Conversation
from ensemble_core.errors import InvalidRequestError
from server.schema.json_values import Integer, Strict, Text, text
from server.schema.replies import PromptToken, Reply, Sent, TraceStep
from server.schema.sampling import SamplingFields, parameter
from server.schema.unsupported import CHAT_IGNORED, CHAT_REFUSED, Ignored, Refused

# Fields of a message that would change the answer; null and empty lists are neutral.
_MESSAGE_UNSUPPORTED = ("audio", "function_call", "tool_call_id", "tool_calls")


class TextPart(BaseModel):
    """A piece of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


def _content(value: object) -> str:
    """Text as it is, or text parts joined by line breaks."""
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


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="developer is treated as system, the name that templates know."
    )
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart])] = Field(
        description="Text, or text parts; parts are joined by line breaks."
    )
    name: str | None = Field(None, description="Accepted; changes nothing.")

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: object) -> object:
        for name in _MESSAGE_UNSUPPORTED:
            if isinstance(value, dict) and value.get(name):
                raise ValueError(f"{name} is not supported in messages; leave it out")
        return value

    def flat(self) -> dict[str, str]:
        """Role and text, in the form that templates take."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class JsonSchema(Strict):
    """The schema that the answer's JSON follows."""

    model_config = ConfigDict(populate_by_name=True)

    name: Text | None = Field(None, description="Accepted; changes nothing.")
    description: str | None = Field(None, description="Accepted; changes nothing.")
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(None, description="Accepted; the schema always binds.")


class ResponseFormat(Strict):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="With type json_schema.")

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be sent with type json_schema, and only with it")
        return self


def to_conversation(messages: list[Message], goes_on: bool, opens_turn: bool) -> Conversation:
    """Messages in the engine's form: continue the last message, or let the templates open the assistant's turn.

    Raises InvalidRequestError where the flags contradict each other or the messages.
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
    return Conversation(tuple(message.flat() for message in messages), goes_on)


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
        description="text or a list of text parts; other parts, `tool_calls`, `audio`: 400; `name` changes nothing",
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
    response_format: ResponseFormat | None = Field(
        None,
        description="`text`, `json_object`, `json_schema`; a mask over the fused distribution, so the schema always "
        "binds; a text that can no longer follow it ends with an error",
        examples=[{"type": "json_object"}],
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
    """The answer."""

    always: ClassVar[tuple[str, ...]] = (
        "refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content",
    )  # fmt: skip

    role: Literal["assistant"]
    content: str
    refusal: None = Field(None, description="Always null, as the next ones.")
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None


class Delta(BaseModel):
    """A piece of the answer. The first piece of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str


class _ChatBase(Sent):
    always: ClassVar[tuple[str, ...]] = ("token_ids",)

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
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

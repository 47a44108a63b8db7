"""Answers of /v1/messages, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.schema.replies import CallUsage, TraceStep


class UsageOfMessages(BaseModel):
    """Counts of the main member's tokens; of a council, the sums of its calls. Cached tokens are counted apart."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    calls: list[CallUsage] | None = Field(None, description="Of a council; not sent for other models.")
    dropped_members: dict[str, str] | None = Field(
        None, description="Member -> why the answer went on without it; not sent if no member was lost."
    )


class TextBlock(BaseModel):
    """Text of an answer."""

    type: Literal["text"]
    text: str


class ToolUseBlock(BaseModel):
    """A call of an answer. A call that was cut has no input."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ThinkingBlock(BaseModel):
    """What the model thought before. It is not signed."""

    type: Literal["thinking"]
    thinking: str
    signature: str


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageReply(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock | ThinkingBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: UsageOfMessages
    served_by: str | None = Field(None, description="Of a council: the model that answered; not sent for others.")
    trace: list[TraceStep] | None = Field(None, description="With ensemble.trace: one entry for each token.")
    council: dict[str, Any] | None = Field(
        None, description="With ensemble.trace: a council's votes, scores, rounds."
    )


class TextDelta(BaseModel):
    """More text."""

    type: Literal["text_delta"]
    text: str


class InputJsonDelta(BaseModel):
    """More of a call's arguments."""

    type: Literal["input_json_delta"]
    partial_json: str


class ThinkingDelta(BaseModel):
    """More thinking."""

    type: Literal["thinking_delta"]
    thinking: str


class StopDelta(BaseModel):
    """How the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class EventOfMessages(BaseModel):
    """An event of a stream."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    index: int | None = None
    message: MessageReply | None = None
    content_block: TextBlock | ToolUseBlock | ThinkingBlock | None = None
    delta: TextDelta | InputJsonDelta | ThinkingDelta | StopDelta | None = None
    usage: UsageOfMessages | None = None
    served_by: str | None = Field(None, description="In message_delta, as in a whole answer.")
    trace: list[TraceStep] | None = Field(None, description="In message_delta, as in a whole answer.")
    council: dict[str, Any] | None = Field(None, description="In message_delta, as in a whole answer.")


class TokenCount(BaseModel):
    """How many tokens messages are as a prompt, in the model's main member."""

    input_tokens: int

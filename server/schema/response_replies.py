"""Answers of /v1/responses: the response, its items, and the events of a stream.

Every field that the official clients require is sent, null where there is nothing to say.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from server.schema.chat import ChatToken
from server.schema.replies import CallUsage, TraceStep

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputTokensDetails(BaseModel):
    """Details of `input_tokens`."""

    cached_tokens: int = Field(description="Found in the main member's cache of earlier prompts.")
    cache_write_tokens: int = Field(description="Always 0: prompts are cached without being asked for.")


class OutputTokensDetails(BaseModel):
    """Details of `output_tokens`."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Counts of the main member's tokens; of a council, the sums of its calls."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    calls: list[CallUsage] | None = Field(None, description="Of a council; not sent for other models.")
    dropped_members: dict[str, str] | None = Field(
        None, description="Member -> why the answer went on without it; not sent if no member was lost."
    )


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChatToken]


class OutputMessage(BaseModel):
    """A message of the answer."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallItem(BaseModel):
    """A call of the answer. arguments: JSON text; it is cut where the answer was."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningText(BaseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """What the model thought before its text or its calls. It is not summed up."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]


OutputItem = OutputMessage | FunctionCallItem | ReasoningItem


class ResponseFailure(BaseModel):
    """Why there is no whole answer."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class IncompleteDetails(BaseModel):
    """Why an answer is cut."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """An answer. Much of it repeats the request."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    top_logprobs: int
    max_output_tokens: int | None
    max_tool_calls: None
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["auto", "disabled"]
    metadata: dict[str, str]
    usage: ResponseUsage | None
    background: Literal[False]
    store: Literal[False]
    previous_response_id: None
    prompt_cache_key: None
    safety_identifier: None
    service_tier: Literal["default"]
    user: None
    served_by: str | None = Field(None, description="Of a council: the model that answered; not sent for others.")
    trace: list[TraceStep] | None = Field(None, description="With ensemble.trace: one entry for each token.")
    council: dict[str, Any] | None = Field(
        None, description="With ensemble.trace: a council's votes, scores, rounds."
    )


class ResponseEvent(BaseModel):
    """An event of a stream. Its number is set where it is sent."""

    type: str
    sequence_number: int = -1


class LifecycleEvent(ResponseEvent):
    """The response as it begins, and as it ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(ResponseEvent):
    """An item begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class ContentPartEvent(ResponseEvent):
    """The text of a message or of reasoning begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class OutputTextDelta(ResponseEvent):
    """More text."""

    type: Literal["response.output_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatToken]
    obfuscation: str | None = Field(None, description="With stream_options.include_obfuscation.")


class OutputTextDone(ResponseEvent):
    """The whole text."""

    type: Literal["response.output_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatToken]


class ReasoningTextDelta(ResponseEvent):
    """More reasoning."""

    type: Literal["response.reasoning_text.delta"]
    item_id: str
    output_index: int
    content_index: int
    delta: str
    obfuscation: str | None = Field(None, description="With stream_options.include_obfuscation.")


class ReasoningTextDone(ResponseEvent):
    """The whole reasoning."""

    type: Literal["response.reasoning_text.done"]
    item_id: str
    output_index: int
    content_index: int
    text: str


class ArgumentsDelta(ResponseEvent):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    item_id: str
    output_index: int
    delta: str
    obfuscation: str | None = Field(None, description="With stream_options.include_obfuscation.")


class ArgumentsDone(ResponseEvent):
    """A call's whole arguments."""

    type: Literal["response.function_call_arguments.done"]
    item_id: str
    output_index: int
    name: str
    arguments: str


class ErrorEvent(ResponseEvent):
    """What went wrong. `response.failed` follows."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None

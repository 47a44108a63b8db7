"""/v1/messages: Anthropic's form of a chat completion. Turns bodies into jobs and outputs into answers.

What a client sends and what the engine reads differ in form alone: this is a translation to what chat does. Nothing
here knows HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, aclosing
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from ensemble_core.decoding.requests import Conversation, Output, Trace
from ensemble_core.errors import InvalidRequestError, quoted
from ensemble_core.text.tools import CallPiece
from ensemble_core.text.variables import TemplateVariables
from server.api.jobs import EventJob, end_of, trace_steps
from server.api.streams import Wire, event
from server.api.tickets import Ticket, make_ticket, sampling_params
from server.api.words import named
from server.edge.errors import ApiError
from server.schema.message_replies import (
    EventOfMessages,
    InputJsonDelta,
    MessageReply,
    StopDelta,
    StopReason,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
    UsageOfMessages,
)
from server.schema.messages import MessageBlock, MessagesBody, MessagesRequest, TurnOfMessages
from server.schema.replies import TraceStep, Usage
from server.schema.tools import to_tool_use

if TYPE_CHECKING:
    from ensemble_core.runtime import OutputStream

_Block = TextBlock | ToolUseBlock | ThinkingBlock

# The engine's and chat's names -> this endpoint's.
_WORDS = (
    (re.compile(r"^prompt$"), "messages"),
    (re.compile(r"^tools\.(\d+)\.function\.parameters"), r"tools.\1.input_schema"),
    (re.compile(r"^tools\.(\d+)\.function\."), r"tools.\1."),
    (re.compile(r"^tool_choice\.function\."), "tool_choice."),
)


def message_words(body: MessagesBody) -> AbstractContextManager[None]:
    """Rename the fields in the engine's InvalidRequestError to the names that this endpoint uses."""

    def rename(param: str) -> str:
        if param == "reasoning_effort":
            return "output_config.effort"
        if param == "thinking_token_budget":
            return "thinking.budget_tokens"
        if param == "stop" and body.stop_sequences and not body.stop:
            return "stop_sequences"
        for pattern, name in _WORDS:
            param = pattern.sub(name, param)
        return param

    return named(rename)


def to_conversation(body: MessagesBody) -> Conversation:
    """The messages in the engine's form. A last message of the assistant is gone on with.

    Raises InvalidRequestError.
    """
    turns = _turns(body.messages)
    if not turns:
        raise InvalidRequestError("messages hold no text; send some", "messages")
    if body.system is not None:
        turns.insert(0, {"role": "system", "content": body.system})
    sent = body.tool_choice
    tools = [tool.nested() for tool in body.tools or ()]
    parallel = (
        None if sent is None or sent.disable_parallel_tool_use is None else not sent.disable_parallel_tool_use
    )
    use = to_tool_use(tools, None if sent is None else sent.nested(), parallel)
    goes_on = turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]
    return Conversation(tuple(turns), goes_on, use, TemplateVariables(effort=body.effort))


def _turns(messages: list[TurnOfMessages]) -> list[dict[str, Any]]:
    """Messages in the form of templates; those of one role that follow each other are one, as with Anthropic."""
    turns: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for rank, message in enumerate(messages):
        for place, block in enumerate(message.content):
            if block.type == "thinking" and message.role == "assistant":
                thought = dict.fromkeys(("reasoning", "reasoning_content"), block.thinking)
                turns.append({"role": "assistant", "content": ""} | thought)
            elif block.type == "text":
                _add_text(turns, message.role, block.text or "")
            elif block.type == "tool_use":
                called[block.id or ""] = block.name or ""
                _add_call(turns, block)
            elif block.type == "tool_result":
                turns.append(_result(block, called, f"messages.{rank}.content.{place}.tool_use_id"))
    return turns


def _add_text(turns: list[dict[str, Any]], role: str, text: str) -> None:
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] = "\n".join(filter(None, (turns[-1]["content"], text)))
    else:
        turns.append({"role": role, "content": text})


def _add_call(turns: list[dict[str, Any]], block: MessageBlock) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    function = {"name": block.name, "arguments": block.input}
    turns[-1].setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})


def _result(block: MessageBlock, called: dict[str, str], where: str) -> dict[str, Any]:
    call_id = block.tool_use_id or ""
    if call_id not in called:
        raise InvalidRequestError(
            f"{where}: {quoted(call_id)} is no tool_use of a message before; send that message, too", where
        )
    return {"role": "tool", "content": block.content, "tool_call_id": call_id, "name": called[call_id]}


def plan(body: MessagesRequest) -> MessageJob:
    """The job that a body asks for. Raises InvalidRequestError."""
    budget = None if body.thinking is None else body.thinking.budget_tokens
    params = sampling_params(body, max_tokens=body.max_tokens, thinking_token_budget=budget)
    return MessageJob(make_ticket(body, "msg_", [to_conversation(body)], params, (1, 1)), body)


class EventsOfMessages(Wire):
    """Events with names, and no `[DONE]`."""

    end = ""

    def chunk(self, item: BaseModel) -> str:
        """An event with its name."""
        return event(item.model_dump_json(exclude_unset=True), cast(EventOfMessages, item).type)

    def failure(self, error: ApiError) -> str:
        """An event `error`."""
        return event(error.json_of_messages(), "error")


class MessageJob(EventJob):
    """One body of /v1/messages."""

    def __init__(self, ticket: Ticket, body: MessagesRequest) -> None:
        super().__init__(ticket)
        self._sends_trace = bool(body.ensemble and body.ensemble.trace)
        self._stops = body.stops
        self._content = _Content()
        self.wire = EventsOfMessages()

    def _events(self, output: Output, *, first: bool) -> Iterator[BaseModel]:
        if first:
            yield EventOfMessages(type="message_start", message=self._reply())
        yield from self._content.add(output)

    async def answer(self, outputs: OutputStream) -> BaseModel:
        """See `Job`. What the events of the stream add up to."""
        ends: list[EventOfMessages] = []
        async with aclosing(self.chunks(outputs)) as events:
            async for each in events:
                event = cast(EventOfMessages, each)
                ends += [event] if event.type == "message_delta" else []
        reply, (end,) = self._reply(), ends
        stopped = cast(StopDelta, end.delta)
        reply.stop_reason, reply.stop_sequence = stopped.stop_reason, stopped.stop_sequence
        self._extend(reply, end.trace, end.council)
        return reply

    def _end(self, output: Output, traces: list[Trace]) -> Iterator[EventOfMessages]:
        yield from self._content.close()
        reason, sequence = self._stop(output)
        delta = StopDelta(stop_reason=reason, stop_sequence=sequence)
        event = EventOfMessages(type="message_delta", delta=delta, usage=to_usage(self.tally.usage()))
        council = None if output.report is None else dict(output.report.trace)
        self._extend(event, trace_steps(traces), council)
        yield event
        yield EventOfMessages(type="message_stop")

    def _extend(
        self,
        told: MessageReply | EventOfMessages,
        trace: list[TraceStep] | None,
        council: dict[str, Any] | None,
    ) -> None:
        """Add what is not Anthropic's."""
        if self.tally.servers is not None:
            told.served_by = self.tally.servers
        if self._sends_trace:
            told.trace = trace
            if council is not None:
                told.council = council

    def _stop(self, output: Output) -> tuple[StopReason, str | None]:
        """Why the answer ended, and the stop string that ended it."""
        if isinstance(output.stop_reason, str) and output.stop_reason in self._stops:
            return "stop_sequence", output.stop_reason
        reasons: dict[str | None, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}
        return reasons.get(end_of(output), "end_turn"), None

    def _reply(self) -> MessageReply:
        """The message as it is now, without its end."""
        return MessageReply(
            id=self.ticket.id,
            type="message",
            role="assistant",
            model=self.ticket.model,
            content=list(self._content.blocks),
            stop_reason=None,
            stop_sequence=None,
            usage=to_usage(self.tally.usage()),
        )


class _Content:
    """The blocks of an answer, and the events as they grow. blocks: those that are whole."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._open: _Block | None = None
        self._pieces: list[str] = []  # of the open block's text or arguments

    def add(self, output: Output) -> Iterator[EventOfMessages]:
        """The events of one output."""
        if output.reasoning:
            if not isinstance(self._open, ThinkingBlock):
                yield from self._begin(ThinkingBlock(type="thinking", thinking="", signature=""))
            yield self._grow(output.reasoning, ThinkingDelta(type="thinking_delta", thinking=output.reasoning))
        if output.text:
            if not isinstance(self._open, TextBlock):
                yield from self._begin(TextBlock(type="text", text=""))
            yield self._grow(output.text, TextDelta(type="text_delta", text=output.text))
        for piece in output.calls:
            yield from self._call(piece)

    def _call(self, piece: CallPiece) -> Iterator[EventOfMessages]:
        if piece.name is not None:
            block = ToolUseBlock(type="tool_use", id=piece.call_id or "", name=piece.name, input={})
            yield from self._begin(block)
        if piece.arguments:
            delta = InputJsonDelta(type="input_json_delta", partial_json=piece.arguments)
            yield self._grow(piece.arguments, delta)

    def close(self) -> Iterator[EventOfMessages]:
        """End the open block, if there is one."""
        if self._open is None:
            return
        yield EventOfMessages(type="content_block_stop", index=len(self.blocks))
        text = "".join(self._pieces)
        if isinstance(self._open, TextBlock):
            self.blocks.append(self._open.model_copy(update={"text": text}))
        elif isinstance(self._open, ThinkingBlock):
            self.blocks.append(self._open.model_copy(update={"thinking": text}))
        else:
            self.blocks.append(self._open.model_copy(update={"input": _whole(text)}))
        self._open = None

    def _begin(self, block: _Block) -> Iterator[EventOfMessages]:
        yield from self.close()
        self._open, self._pieces = block, []
        yield EventOfMessages(type="content_block_start", index=len(self.blocks), content_block=block)

    def _grow(self, more: str, delta: TextDelta | InputJsonDelta | ThinkingDelta) -> EventOfMessages:
        self._pieces.append(more)
        return EventOfMessages(type="content_block_delta", index=len(self.blocks), delta=delta)


def _whole(arguments: str) -> dict[str, Any]:
    """Arguments as an object; none if they were cut."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def to_usage(usage: Usage) -> UsageOfMessages:
    """The counts under this endpoint's names."""
    cached = usage.prompt_tokens_details.cached_tokens
    told = UsageOfMessages(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        cache_creation_input_tokens=0,
        output_tokens=usage.completion_tokens,
    )
    if usage.calls is not None:
        told.calls = usage.calls
    if usage.dropped_members is not None:
        told.dropped_members = usage.dropped_members
    return told

"""/v1/responses: turns bodies into jobs and outputs into answers. Nothing here knows HTTP.

A conversation comes whole, as items. What a client sends and what the engine reads differ in form alone: this is a
translation to what chat does.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel

from ensemble_core.decoding.requests import Conversation, Output, Trace
from ensemble_core.decoding.sampling_params import PARAMETERS
from ensemble_core.errors import InvalidRequestError, quoted
from ensemble_core.text.variables import TemplateVariables
from server.api.chat import room_left
from server.api.jobs import EventJob, end_of, trace_steps
from server.api.response_events import EventWriter
from server.api.streams import Wire, event
from server.api.tickets import Ticket, make_ticket, sampling_params
from server.api.words import named
from server.edge.errors import ApiError
from server.schema.replies import Usage
from server.schema.response_replies import (
    InputTokensDetails,
    LifecycleEvent,
    OutputTokensDetails,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from server.schema.responses import InputItem, ResponseRequest
from server.schema.tools import to_tool_use

if TYPE_CHECKING:
    from ensemble_core.runtime import OutputStream, Tokenized

Measure = Callable[[Conversation], Awaitable["Tokenized"]]

# The engine's and chat's names -> this endpoint's.
_WORDS = (
    (re.compile(r"^(prompt|messages)$"), "input"),
    (re.compile(r"^max_tokens$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^tools\.(\d+)\.function\."), r"tools.\1."),
    (re.compile(r"^tool_choice\.function\."), "tool_choice."),
    (re.compile(r"^tool_choice\.allowed_tools\.tools\.(\d+)\.function\."), r"tool_choice.tools.\1."),
)


def response_words() -> AbstractContextManager[None]:
    """Rename the fields in the engine's InvalidRequestError to the names that this endpoint uses."""

    def rename(param: str) -> str:
        for pattern, name in _WORDS:
            param = pattern.sub(name, param)
        return param

    return named(rename)


async def fitted(body: ResponseRequest, measure: Measure) -> tuple[Conversation, int]:
    """The conversation and the length limit. measure: a conversation in the tokens of the model.

    With truncation auto the oldest turns are left out until the answer has its room: `max_output_tokens`, or a
    quarter of the context. Costs as many tokenisations as the number of turns has binary digits. Raises
    InvalidRequestError.
    """
    start = await _first_that_fits(body, measure) if body.truncation == "auto" else 0
    prompt = to_conversation(body, start)
    if body.max_output_tokens is not None:
        return prompt, body.max_output_tokens
    found = await measure(prompt)
    return prompt, room_left(len(found.token_ids), found.max_model_len)


async def _first_that_fits(body: ResponseRequest, measure: Measure) -> int:
    """Where the items begin that fit, by bisection over the turns; the last turn if none do."""
    turns = [0, *(rank for rank, item in enumerate(body.input) if rank and item.opens_turn)]
    low, high = 0, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        found = await measure(to_conversation(body, turns[middle]))
        room = found.max_model_len // 4 if body.max_output_tokens is None else body.max_output_tokens
        if len(found.token_ids) + room <= found.max_model_len:
            high = middle
        else:
            low = middle + 1
    return turns[low]


def to_conversation(body: ResponseRequest, start: int = 0) -> Conversation:
    """The items from `start` on as messages, behind the instructions. Raises InvalidRequestError."""
    turns = _turns(body.input, start)
    if not turns:
        raise InvalidRequestError("input has no message; send one", "input")
    if body.instructions is not None:
        turns.insert(0, {"role": "system", "content": body.instructions})
    choice = None if body.tool_choice is None else body.tool_choice.nested()
    tools = [tool.nested() for tool in body.tools or ()]
    use = to_tool_use(tools, choice, body.parallel_tool_calls)
    effort = None if body.reasoning is None else body.reasoning.effort
    return Conversation(tuple(_one_system(turns)), tools=use, variables=TemplateVariables(effort=effort))


def _turns(items: Sequence[InputItem], start: int) -> list[dict[str, Any]]:
    """Messages in the form of templates. What a call before `start` returned is left out with it."""
    turns: list[dict[str, Any]] = []
    called: dict[str | None, str | None] = {}
    thought: str | None = None  # of the assistant's turn that comes next
    lost = {item.call_id for item in items[:start] if item.type == "function_call"}
    for rank, item in enumerate(items[start:], start):
        if item.type == "reasoning":
            thought = item.content
        elif item.type == "message":
            _add_message(turns, item, thought)
            thought = None
        elif item.type == "function_call":
            called[item.call_id] = item.name
            _add_call(turns, item, thought)
            thought = None
        elif item.type == "function_call_output" and (item.call_id in called or item.call_id not in lost):
            turns.append(_result(item, rank, called))
    return turns


def _add_message(turns: list[dict[str, Any]], item: InputItem, thought: str | None) -> None:
    """A message; text that an assistant wrote beside its calls belongs to their turn."""
    if item.role != "assistant":
        turns.append({"role": "system" if item.role == "developer" else item.role, "content": item.content})
    elif turns and "tool_calls" in turns[-1] and thought is None:
        turns[-1]["content"] = "\n".join(filter(None, (turns[-1]["content"], item.content)))
    else:
        turns.append(_assistants(item.content, thought))


def _add_call(turns: list[dict[str, Any]], item: InputItem, thought: str | None) -> None:
    """A call; it belongs to the assistant's turn that it follows."""
    if not turns or turns[-1]["role"] != "assistant" or thought is not None:
        turns.append(_assistants("", thought))
    function = {"name": item.name, "arguments": item.arguments}
    turns[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _assistants(content: str | None, thought: str | None) -> dict[str, Any]:
    """A turn of the assistant; templates know two names of what it thought before."""
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    return turn if thought is None else turn | dict.fromkeys(("reasoning", "reasoning_content"), thought)


def _result(item: InputItem, rank: int, called: Mapping[str | None, str | None]) -> dict[str, Any]:
    if item.call_id not in called:
        where = f"input.{rank}.call_id"
        raise InvalidRequestError(
            f"{where}: {quoted(item.call_id)} is no call of an item before; send its function_call, too", where
        )
    return {
        "role": "tool",
        "content": item.output,
        "tool_call_id": item.call_id,
        "name": called[item.call_id],
    }


def _one_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the system messages at the beginning as one, since most templates take one."""
    head = list(takewhile(lambda turn: turn["role"] == "system", turns))
    if len(head) < 2:
        return turns
    return [{"role": "system", "content": "\n\n".join(turn["content"] for turn in head)}, *turns[len(head) :]]


def plan(body: ResponseRequest, prompt: Conversation, max_tokens: int) -> ResponseJob:
    """The job that a body asks for. Raises InvalidRequestError."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
    PARAMETERS["logprobs"].check("top_logprobs", body.top_logprobs or 0)
    budget = body.thinking_token_budget
    params = sampling_params(body, max_tokens=max_tokens, logprobs=body.num_logprobs, thinking_token_budget=budget)
    return ResponseJob(make_ticket(body, "resp_", [prompt], params, (1, 1)), body)


class NamedEvents(Wire):
    """Events with names, and no `[DONE]`. A failure ends the stream with the response as it is then."""

    end = ""

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def chunk(self, item: BaseModel) -> str:
        """An event with its name."""
        return event(item.model_dump_json(exclude_unset=True), cast(ResponseEvent, item).type)

    def failure(self, error: ApiError) -> str:
        """`error` and `response.failed`, with what comes before them if nothing has."""
        return "".join(map(self.chunk, self._writer.fail(error)))


class ResponseJob(EventJob):
    """One body of /v1/responses."""

    def __init__(self, ticket: Ticket, body: ResponseRequest) -> None:
        super().__init__(ticket)
        self._response = _begun(ticket, body)
        self._sends_trace = bool(body.ensemble and body.ensemble.trace)
        self._pads = bool(body.stream_options and body.stream_options.include_obfuscation)
        self._num_top = body.num_logprobs
        self._writer = EventWriter(self._response, self._num_top, self._pads)
        self.wire = NamedEvents(self._writer)

    def _events(self, output: Output, *, first: bool) -> Iterator[BaseModel]:
        yield from self._writer.add(output)

    async def answer(self, outputs: OutputStream) -> BaseModel:
        """See `Job`. What the last event of the stream has."""
        async with aclosing(self.chunks(outputs)) as events:
            async for each in events:
                last = each
        return cast(LifecycleEvent, last).response

    def _end(self, output: Output, traces: Sequence[Trace]) -> Iterator[ResponseEvent]:
        """The last events. output: the last one; traces: of all."""
        response = self._response.model_copy(update={"usage": to_usage(self.tally.usage())})
        if self.tally.servers is not None:
            response.served_by = self.tally.servers
        if self._sends_trace:
            response.trace = trace_steps(traces)
            if output.report is not None:
                response.council = dict(output.report.trace)
        yield from self._writer.end(response, cut=end_of(output) == "length")


def _begun(ticket: Ticket, body: ResponseRequest) -> ResponseObject:
    """The response before its first token."""
    params = ticket.requests[0].params
    return ResponseObject(
        id=ticket.id,
        object="response",
        created_at=ticket.created,
        completed_at=None,
        status="in_progress",
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        model=ticket.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=params.temperature,
        top_p=params.top_p,
        top_logprobs=body.top_logprobs or 0,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=None,
        tool_choice="auto" if body.tool_choice is None else body.tool_choice.told(),
        tools=[tool.told() for tool in body.tools or ()],
        text=_told_text(body),
        reasoning=_told_reasoning(body),
        truncation=body.truncation or "disabled",
        metadata=body.metadata or {},
        usage=None,
        background=False,
        store=False,
        previous_response_id=None,
        prompt_cache_key=None,
        safety_identifier=None,
        service_tier="default",
        user=None,
    )


def _told_text(body: ResponseRequest) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    told: dict[str, Any] = {"type": "text" if wanted is None else wanted.type}
    if wanted is not None and wanted.schema_ is not None:
        told |= {
            "name": wanted.name or "",
            "description": wanted.description,
            "schema": wanted.schema_,
            "strict": wanted.strict is not False,
        }
    return {"format": told, "verbosity": "medium"}


def _told_reasoning(body: ResponseRequest) -> dict[str, Any]:
    sent = body.reasoning
    return {"effort": sent.effort if sent else None, "summary": sent.summary if sent else None}


def to_usage(usage: Usage) -> ResponseUsage:
    """The counts under this endpoint's names."""
    details = usage.completion_tokens_details
    told = ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=0 if details is None else details.reasoning_tokens
        ),
        total_tokens=usage.total_tokens,
    )
    if usage.calls is not None:
        told.calls = usage.calls
    if usage.dropped_members is not None:
        told.dropped_members = usage.dropped_members
    return told

"""The events of a response: their order and numbers, and that the whole answer is what the last one has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from fake_runtime import FakeRuntime, outputs_of
from sdk_events import read_events, whole_of

from ensemble_core.decoding.requests import CallReport, CouncilReport, Output
from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.tools import CallPiece
from server.api.responses import ResponseJob, plan, to_conversation
from server.api.streams import encode
from server.edge.errors import RequestFailedError
from server.schema.responses import ResponseRequest

CALLS = (
    CallPiece(0, "", "f", "call_1"),
    CallPiece(0, '{"a"'),
    CallPiece(0, ": 1}"),
    CallPiece(1, "{}", "g", "call_2"),
)
LOGPROBS = "message.output_text.logprobs"


def job_of(**fields: Any) -> ResponseJob:
    body = ResponseRequest.model_validate({"model": "duo", "input": "Hi!"} | fields)
    return plan(body, to_conversation(body), 20)


async def sent(outputs: list[Output], error: Exception | None = None) -> AsyncGenerator[tuple[int, Output]]:
    for output in outputs:
        yield 0, output
    if error is not None:
        raise error


def streamed(job: ResponseJob, outputs: list[Output], error: Exception | None = None) -> list[Any]:
    """The events that a client reads."""

    async def run() -> str:
        chunks = job.chunks(sent(outputs, error))  # type: ignore[arg-type]
        return "".join([text async for text in encode(anext(chunks), chunks, job.wire)])

    return read_events(asyncio.run(run()))


def answered(job: ResponseJob, outputs: list[Output]) -> Any:
    answer = asyncio.run(job.answer(sent(outputs)))  # type: ignore[arg-type]
    return whole_of(json.loads(answer.model_dump_json(exclude_unset=True)))


def without_ids(value: Any) -> Any:
    """A response without what is drawn or read off the clock anew."""
    if isinstance(value, dict):
        drawn = ("id", "created_at", "completed_at")
        return {key: without_ids(each) for key, each in value.items() if key not in drawn}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def test_the_events_of_a_text() -> None:
    events = streamed(job_of(), outputs_of((" Hello", "", " wörld"), "Hi!"))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [events[rank].response.status for rank in (0, 1, -1)] == ["in_progress", "in_progress", "completed"]
    assert events[0].response.output == []
    assert events[-1].response.output_text == " Hello wörld"
    assert events[-1].response.completed_at is not None


def test_the_events_of_calls() -> None:
    events = streamed(job_of(), outputs_of(("Well.", *CALLS), "Hi!"))
    message, first, second = events[-1].response.output
    assert message.content[0].text == "Well."
    assert (first.name, first.call_id, first.arguments, first.status) == ("f", "call_1", '{"a": 1}', "completed")
    assert (second.name, second.call_id, second.arguments) == ("g", "call_2", "{}")
    assert len({message.id, first.id, second.id}) == 3
    assert [item.id.partition("_")[0] for item in (message, first, second)] == ["msg", "fc", "fc"]
    added = next(
        event.item for event in events if event.type == "response.output_item.added" and event.output_index
    )
    assert (added.name, added.call_id, added.arguments, added.status) == ("f", "call_1", "", "in_progress")


@pytest.mark.parametrize(
    ("pieces", "finish", "fields"),
    [
        ((" Hello", " wörld"), "stop", {}),
        ((" Hello", "", " wörld"), "length", {"instructions": "x", "metadata": {"a": "b"}}),
        (("", ""), "stop", {}),
        (
            ("Well.", *CALLS),
            "tool_calls",
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": "required"},
        ),
        (CALLS[:2], "length", {"text": {"format": {"type": "json_object"}}}),
        ((" a", "b"), "stop", {"include": [LOGPROBS], "top_logprobs": 2}),
        (("", " a", "", *CALLS), "tool_calls", {"include": [LOGPROBS], "top_logprobs": 2}),
        (
            (" a", "b"),
            "stop",
            {"ensemble": {"trace": True}, "truncation": "auto", "reasoning": {"effort": "none"}},
        ),
    ],
)
def test_the_answer_is_what_the_last_event_has(pieces: Any, finish: str, fields: dict[str, Any]) -> None:
    asked = job_of(**fields)
    runtime = FakeRuntime(script=pieces)
    outputs = runtime._outputs(asked.ticket.requests[0])
    outputs[-1] = replace(outputs[-1], finish_reason=finish)  # type: ignore[arg-type]
    last = streamed(asked, outputs)[-1]
    whole = answered(job_of(**fields), outputs)
    assert without_ids(last.response.to_dict()) == without_ids(whole.to_dict())
    assert last.type == f"response.{whole.status}"
    assert whole.usage.output_tokens == len(pieces)


def thinking() -> list[Output]:
    """Two outputs of reasoning, then text and a call."""
    outputs = outputs_of(("", "", "Well.", *CALLS[:2]), "Hi!")
    outputs[0] = replace(outputs[0], reasoning="Hm", num_reasoning_tokens=1)
    outputs[1] = replace(outputs[1], reasoning=".", num_reasoning_tokens=2)
    return [*outputs[:2], *(replace(each, num_reasoning_tokens=2) for each in outputs[2:])]


def test_the_events_of_reasoning() -> None:
    events = streamed(job_of(stream=True, stream_options={"include_obfuscation": True}), thinking())
    assert [event.type.removeprefix("response.") for event in events[2:9]] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    thought, message, call = events[-1].response.output
    assert (thought.id[:3], thought.type, thought.summary, thought.status) == ("rs_", "reasoning", [], "completed")
    assert [part.text for part in thought.content] == ["Hm."]
    assert (message.content[0].text, call.name) == ("Well.", "f")
    assert events[-1].response.output_text == "Well."
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens == 2
    whole = answered(job_of(), thinking())
    assert without_ids(whole.output[0].to_dict()) == without_ids(thought.to_dict())


def test_an_answer_may_be_cut_in_its_reasoning() -> None:
    cut = thinking()[:2]
    cut[-1] = replace(cut[-1], finish_reason="length")
    (thought,) = streamed(job_of(), cut)[-1].response.output
    assert (thought.type, thought.status) == ("reasoning", "incomplete")


def test_log_probabilities_of_reasoning_have_no_place() -> None:
    asked = job_of(include=[LOGPROBS])
    told = FakeRuntime(script=("", "", "Well."))._outputs(asked.ticket.requests[0])
    told[0] = replace(told[0], reasoning="Hm")
    told[1] = replace(told[1], reasoning=".")
    message = answered(asked, told).output[-1]
    assert [each.token for each in message.content[0].logprobs] == ["Well."]


def test_a_cut_answer_is_incomplete() -> None:
    outputs = outputs_of((" Hello",), "Hi!", "length")
    found = answered(job_of(max_output_tokens=20), outputs)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.output[0].status == "incomplete"
    assert (found.completed_at, found.max_output_tokens) == (None, 20)
    cut = outputs_of(CALLS[:2], "Hi!")
    cut[-1] = replace(cut[-1], finish_reason="length")
    (call,) = answered(job_of(), cut).output
    assert (call.status, call.arguments) == ("incomplete", '{"a"')


def test_an_empty_answer_is_an_empty_message() -> None:
    (message,) = streamed(job_of(), outputs_of(("",), "Hi!"))[-1].response.output
    assert (message.status, message.content[0].text) == ("completed", "")


def test_log_probabilities_are_those_of_the_text() -> None:
    """Also of tokens whose text is held back; those of calls have no place."""
    asked = job_of(include=[LOGPROBS], top_logprobs=1)
    script = ("", " a", "", *CALLS)
    outputs = FakeRuntime(script=script)._outputs(asked.ticket.requests[0])
    events = streamed(asked, outputs)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [len(event.logprobs) for event in deltas] == [2]
    message = events[-1].response.output[0]
    assert [each.token for each in message.content[0].logprobs] == ["", " a"]
    assert len(message.content[0].logprobs[1].top_logprobs) == 1
    trailing = outputs[:3]
    trailing[-1] = replace(trailing[-1], finish_reason="stop")
    *_, last = streamed(job_of(include=[LOGPROBS]), trailing)
    assert len(last.response.output[0].content[0].logprobs) == 3


def test_padding_hides_the_size_of_deltas() -> None:
    asked = job_of(stream=True, stream_options={"include_obfuscation": True})
    events = streamed(asked, outputs_of(("a", "bcd" * 20, *CALLS), "Hi!"))
    sizes = [len(event.delta) + len(event.obfuscation) for event in events if event.type.endswith(".delta")]
    assert sizes == [32, 64, 32, 32, 32]
    plain = streamed(job_of(stream=True), outputs_of(("a",), "Hi!"))
    assert not any(hasattr(event, "obfuscation") for event in plain)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (RequestFailedError("it broke \ud800"), "request_failed", "server_error"),
        (InvalidRequestError("too long", "prompt"), None, "invalid_prompt"),
        (ValueError("secret"), "internal_error", "server_error"),
    ],
)
@pytest.mark.parametrize("num", [0, 1, 4])
def test_a_failure_ends_the_response(num: int, error: Exception, code: str | None, kind: str) -> None:
    events = streamed(job_of(), outputs_of(("Well.", *CALLS), "Hi!")[:num], error)
    told, failed = events[-2:]
    assert (told.type, told.code, failed.type, failed.response.error.code) == (
        "error",
        code,
        "response.failed",
        kind,
    )
    assert told.message == failed.response.error.message
    assert "secret" not in told.message
    assert [item.status for item in failed.response.output] == [[], ["incomplete"], ["completed", "incomplete"]][
        (0, 1, 4).index(num)
    ]


def test_a_council_says_who_answered_and_counts_its_calls() -> None:
    call = CallReport("node", "a", 0, 0, 3, 1, 2, 0.5, "stop")
    output = replace(
        outputs_of(("x",), "Hi!")[0], served_by="a", report=CouncilReport((call,), {"v": {"votes": 1}})
    )
    asked = job_of(ensemble={"trace": True})
    found = answered(asked, [output])
    assert asked.headers() == {"X-Served-By": "a"}
    assert (found.served_by, found.model, found.council) == ("a", "duo", {"v": {"votes": 1}})
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (3, 2, 5)
    assert found.usage.calls[0]["node"] == "node"
    assert found.usage.input_tokens_details.cached_tokens == 1
    last = streamed(job_of(), [output])[-1]
    assert last.response.served_by == "a"
    assert not hasattr(last.response, "council")

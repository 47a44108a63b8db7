"""POST /v1/messages through the whole app, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_runtime import FakeRuntime, outputs_of
from pydantic import SecretStr
from starlette.testclient import TestClient

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import CallReport, Conversation, CouncilReport
from ensemble_core.errors import InvalidRequestError, MemberError, NotReadyError, QueueFullError
from ensemble_core.server_config import ServerConfig
from ensemble_core.text.tools import CallPiece, Tool, ToolUse
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": "a b c"}
BASE: dict[str, Any] = {"model": "duo", "max_tokens": 20, "messages": [USER]}
TEXT = " Hello wörld 😀!"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL: dict[str, Any] = {"name": "warmth", "description": "How warm?", "input_schema": SCHEMA}
CALL = (CallPiece(0, "", "warmth", "call_1"), CallPiece(0, '{"city"'), CallPiece(0, ': "Oslo"}'))
USE = {"type": "tool_use", "id": "call_1", "name": "warmth", "input": {"city": "Oslo"}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
RESULT = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "21"}]}


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


def client_of(runtime: FakeRuntime, config: ServerConfig) -> TestClient:
    app = create_app(runtime, config, PrometheusMetrics())  # type: ignore[arg-type]
    return TestClient(app, raise_server_exceptions=False, base_url="http://localhost", headers=JSON)


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    with client_of(runtime, ServerConfig()) as client:
        yield client


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/messages", json=BASE | fields)


def read_events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events."""
    start, *inner, end, stop = events
    assert [start["type"], end["type"], stop] == ["message_start", "message_delta", {"type": "message_stop"}]
    message: dict[str, Any] = start["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    grown = ""
    for event in inner:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            grown = ""
        block = message["content"][event["index"]]
        if event["type"] == "content_block_delta":
            grown += next(value for name, value in event["delta"].items() if name != "type")
        elif event["type"] == "content_block_stop":
            kind = block["type"]
            block |= {"input": json.loads(grown)} if kind == "tool_use" else {kind: grown}
    return message | end["delta"] | {name: value for name, value in end.items() if name not in ("type", "delta")}


def test_the_answer(client: TestClient, runtime: FakeRuntime) -> None:
    answer = post(client, system=[{"type": "text", "text": "Be brief."}]).json()
    assert answer.pop("id").startswith("msg_")
    usage = answer.pop("usage")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "duo",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }
    assert usage == {
        "input_tokens": 6,
        "cache_read_input_tokens": 0,
        "cache_creation_input_tokens": 0,
        "output_tokens": 4,
    }
    assert runtime.seen[0].prompt == Conversation(({"role": "system", "content": "Be brief."}, USER))
    assert runtime.seen[0].params.max_tokens == 20


@pytest.mark.parametrize("script", [(" Hello", "", " wörld"), ("Let me see.", *CALL), CALL, ("",)])
@pytest.mark.parametrize("trace", [False, True])
def test_the_stream_adds_up_to_the_answer(
    client: TestClient, runtime: FakeRuntime, script: tuple[Any, ...], trace: bool
) -> None:
    runtime.script = script
    fields = {"tools": [TOOL], "ensemble": {"trace": trace}}
    whole = post(client, **fields).json()
    text = post(client, stream=True, **fields).text
    assert "[DONE]" not in text
    message = folded(read_events(text))
    assert {**message, "id": ""} == {**whole, "id": ""}
    assert ("trace" in whole) == trace
    assert whole["stop_reason"] == ("tool_use" if CALL[0] in script else "end_turn")


def test_how_answers_end(client: TestClient, runtime: FakeRuntime) -> None:
    def ended(finish: str, stop: Any, script: tuple[Any, ...] = ("a",), **fields: Any) -> tuple[Any, ...]:
        outputs = outputs_of(script, "x")
        outputs[-1] = replace(outputs[-1], finish_reason=finish, stop_reason=stop)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "_outputs", lambda _request: outputs)
            told = post(client, **fields).json()
        return told["stop_reason"], told["stop_sequence"], told["content"]

    text = [{"type": "text", "text": "a"}]
    assert ended("length", None) == ("max_tokens", None, text)
    assert ended("stop", "END", stop_sequences=["END"]) == ("stop_sequence", "END", text)
    assert ended("stop", 5, stop_token_ids=[5]) == ("end_turn", None, text)
    (_, _, (cut,)) = ended("length", None, CALL[:2], tools=[TOOL])
    assert cut == USE | {"input": {}}


def test_calls_and_results_come_back(client: TestClient, runtime: FakeRuntime) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": [THOUGHT, {"type": "text", "text": "Well."}, USE]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "And?"}]},
        {"role": "user", "content": "Go on."},
    ]  # fmt: skip
    fields = {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    assert post(client, messages=messages, **fields).status_code == 200
    prompt = runtime.seen[0].prompt
    assert isinstance(prompt, Conversation)
    function = {"name": "warmth", "arguments": {"city": "Oslo"}}
    assert [dict(each) for each in prompt.messages] == [
        USER,
        {
            "role": "assistant",
            "content": "Well.",
            "reasoning": "Hm.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "21", "tool_call_id": "call_1", "name": "warmth"},
        {"role": "user", "content": "And?\nGo on."},
    ]
    assert prompt.tools == ToolUse((Tool("warmth", "How warm?", json.dumps(SCHEMA)),), "required", parallel=False)
    assert not prompt.continue_final


def test_a_last_message_of_the_assistant_is_gone_on_with(client: TestClient, runtime: FakeRuntime) -> None:
    begun = {"role": "assistant", "content": "Well,"}
    post(client, messages=[USER, begun])
    assert runtime.seen[0].prompt == Conversation((USER, begun), continue_final=True)


def test_forms_and_stops(client: TestClient, runtime: FakeRuntime) -> None:
    wanted = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    post(client, output_config=wanted, stop_sequences=["x", "y"], top_k=3)
    params = runtime.seen[0].params
    assert params.form == TextForm("json", '{"type":"object"}')
    assert (params.stop, params.top_k) == (("x", "y"), 3)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"max_tokens": 600}, "max_tokens", "room"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type", "'image'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.tool_use_id", "'call_1'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        ({"messages": [{"role": "user", "content": [THOUGHT]}]}, "messages", "no text"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type", "'bash_20250124'"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name", "two tools"),
        ({"tools": [TOOL | {"input_schema": {"type": "string"}}]}, "tools.0.input_schema", "object"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name", "not among"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice", "name must be sent"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking", "only allowed with type enabled"),
        ({"output_config": {"effort": "much"}}, "output_config.effort", "'none', 'minimal'"),
        ({"stop_sequences": ["a"], "stop": "b"}, "stop", "another name"),
        ({"stop_sequences": [""]}, "stop_sequences", "characters"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "is not supported"),
        ({"system": [{"type": "image"}]}, "system", "'image'"),
        ({"temperature": 3}, "temperature", "2"),
    ],
)
def test_refusals(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    answer = post(client, **fields)
    assert answer.status_code == 400
    told = answer.json()
    assert set(told) == {"type", "error"}
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert told["error"]["param"] == param
    assert words in told["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequestError("prompt: too long", "prompt"), 400, "invalid_request_error"),
        (QueueFullError("full"), 429, "rate_limit_error"),
        (NotReadyError("loading"), 503, "overloaded_error"),
        (MemberError("a", "broke"), 500, "api_error"),
        (RuntimeError("a bug"), 500, "api_error"),
    ],
)
def test_errors_have_anthropics_shape(
    client: TestClient, runtime: FakeRuntime, error: Exception, status: int, kind: str
) -> None:
    runtime.refuse = error
    answer = post(client)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert answer.headers["x-request-id"]
    runtime.refuse, runtime.breaks = None, error
    if status != 400:
        *_, last = read_events(post(client, stream=True).text)
        assert (last["type"], last["error"]["type"]) == ("error", kind)


def test_keys_come_in_either_header(runtime: FakeRuntime) -> None:
    with client_of(runtime, ServerConfig(api_keys=(SecretStr("mine"),))) as client:
        assert client.post("/v1/messages", json=BASE, headers={"X-Api-Key": "mine"}).status_code == 200
        assert client.post("/v1/messages", json=BASE, headers={"Authorization": "Bearer mine"}).status_code == 200
        refused = client.post("/v1/messages", json=BASE, headers={"X-Api-Key": "other"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        both = {"Authorization": "Bearer other", "X-Api-Key": "mine"}
        assert client.post("/v1/messages", json=BASE, headers=both).status_code == 401


def test_a_council_says_who_answered(client: TestClient, runtime: FakeRuntime) -> None:
    call = CallReport("node", "a", 0, 0, 3, 1, 2, 0.5, "stop")
    output = replace(outputs_of(("x",), "x")[0], served_by="a", report=CouncilReport((call,), {"v": {"votes": 1}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_outputs", lambda _request: [output])
        whole = post(client, ensemble={"trace": True})
        message = folded(read_events(post(client, ensemble={"trace": True}, stream=True).text))
    told = whole.json()
    assert whole.headers["x-served-by"] == "a"
    assert {**message, "id": ""} == {**told, "id": ""}
    assert (told["served_by"], told["council"]) == ("a", {"v": {"votes": 1}})
    assert (told["usage"]["input_tokens"], told["usage"]["cache_read_input_tokens"]) == (2, 1)

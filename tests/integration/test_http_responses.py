"""POST /v1/responses through the whole app, over a scripted engine; and through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_runtime import FakeRuntime, live_server
from pydantic import BaseModel
from sdk_events import read_events, whole_of
from starlette.testclient import TestClient

from ensemble_core.decoding.forms import TextForm
from ensemble_core.errors import InvalidRequestError, MemberError, NotReadyError, QueueFullError
from ensemble_core.limits import LimitsConfig
from ensemble_core.server_config import ServerConfig
from ensemble_core.text.tools import CallPiece
from server.api import streams
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

JSON = {"Content-Type": "application/json"}
BASE: dict[str, Any] = {"model": "duo", "input": "a b c"}
TEXT = " Hello wörld 😀!"
TOOL: Any = {
    "type": "function",
    "name": "warmth",
    "description": "How warm a city is.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = (CallPiece(0, "", "warmth", "call_1"), CallPiece(0, '{"city"'), CallPiece(0, ': "Oslo"}'))


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    config = ServerConfig(limits=LimitsConfig(messages=8))
    app = create_app(runtime, config, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost", headers=JSON) as client:
        yield client


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/responses", json=BASE | fields)


def test_the_answer(client: TestClient, runtime: FakeRuntime) -> None:
    sent: dict[str, Any] = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "temperature": 0.5,
        "store": True,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "warmth"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    }
    told = post(client, **sent).json()
    answer = whole_of(told)
    assert answer.output_text == TEXT
    assert (answer.id[:5], answer.object, answer.status, answer.model) == ("resp_", "response", "completed", "duo")
    assert {name: told[name] for name in ("instructions", "metadata", "temperature", "tools", "tool_choice")} == {
        name: sent[name] for name in ("instructions", "metadata", "temperature", "tools", "tool_choice")
    }
    assert told["text"]["format"]["schema"] == {"type": "object"}
    assert (told["store"], told["background"], told["previous_response_id"]) == (False, False, None)
    assert told["usage"] == {
        "input_tokens": 6,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }
    assert not {"served_by", "trace", "council"} & told.keys()
    assert runtime.seen[0].request_id.startswith(answer.id)
    assert [message["role"] for message in runtime.seen[0].prompt.messages] == ["system", "user"]  # type: ignore[union-attr]
    assert runtime.seen[0].params.form == TextForm("json", '{"type":"object"}')


def test_the_stream(client: TestClient) -> None:
    answer = post(client, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in answer.text
    events = read_events(answer.text)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert events[-1].response.usage.output_tokens == 4
    assert len({event.response.id for event in (events[0], events[1], events[-1])}) == 1


def test_without_a_limit_the_answer_may_fill_the_context(client: TestClient, runtime: FakeRuntime) -> None:
    num = post(client).json()["usage"]["input_tokens"]
    assert runtime.seen[0].params.max_tokens == 512 - num
    assert post(client, max_output_tokens=7).json()["max_output_tokens"] == 7
    assert runtime.seen[1].params.max_tokens == 7


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'web_search' are not served"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type", "'mcp' is not served"),
        ({"input": [{"type": "local_shell_call_output"}]}, "input.0.type", "'local_shell_call_output'"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 5}, "input", "list"),
        ({"input": [{"role": "user", "content": "x"}] * 9}, "input", "up to 8 entries"),
        ({"input": [{"role": "user", "content": [{}] * 9}]}, "input.0.content", "up to 8 entries"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "this endpoint takes `input`"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 600}, "max_output_tokens", "room for 508"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "'none', 'minimal'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "send \"auto\" or null"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "send \"medium\" or null"),
        ({"input": "w " * 600}, "input", "512"),
        ({"ensemble": {"colour": 1}}, "ensemble.colour", "unknown"),
    ],
)  # fmt: skip
def test_refusals(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    answer = post(client, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]


def test_a_schema_that_is_too_deep_to_repeat_is_refused(client: TestClient) -> None:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    form = {"format": {"type": "json_schema", "name": "x", "schema": deep}}
    assert post(client, text=form).json()["error"]["param"] == "text.format.schema"
    odd = {"format": {"type": "json_schema", "name": "x", "schema": {"title": "\ud800"}}}
    answer = client.post("/v1/responses", content=json.dumps(BASE | {"text": odd}))
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequestError("prompt: too long", "prompt"), 400),
        (QueueFullError("full"), 429),
        (NotReadyError("loading"), 503),
        (MemberError("a", "broke"), 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine_set_the_status(
    client: TestClient, runtime: FakeRuntime, error: Exception, status: int, stream: bool
) -> None:
    runtime.refuse = error
    answer = post(client, stream=stream)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"] == {
            "message": "input: too long",
            "type": "invalid_request_error",
            "param": "input",
            "code": None,
        }


def test_a_failure_in_a_stream_is_told_twice_and_counted_once(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.breaks = MemberError("b", "broke")
    assert post(client).status_code == 500
    *_, error, failed = read_events(post(client, stream=True).text)
    assert (error.type, error.code) == ("error", "request_failed")
    assert "broke" in failed.response.error.message
    assert failed.response.output[0].content[0].text == " Hello wörld 😀"
    assert runtime.num_open == 0


def test_a_stream_that_keeps_a_client_waiting(
    client: TestClient, runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(streams, "KEEPALIVE_SECONDS", 0.05)
    runtime.delay = 0.2
    answer = post(client, stream=True)
    assert answer.text.startswith(": keepalive\n\n")
    assert read_events(answer.text)[-1].response.output_text == TEXT


def test_our_extension(client: TestClient, runtime: FakeRuntime) -> None:
    told = post(client, ensemble={"members": ["a"], "trace": True}, top_k=5, seed=3, stop=["x"]).json()
    assert [step["token"] for step in told["trace"]] == list(runtime.script)
    assert runtime.seen[0].overrides.members == ("a",)
    assert (runtime.seen[0].params.top_k, runtime.seen[0].params.stop) == (5, ("x",))


@pytest.fixture
def base(runtime: FakeRuntime) -> Iterator[str]:
    with live_server(runtime, ServerConfig(drain_seconds=0.2)) as base:
        yield base


@pytest.fixture
def sdk(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0) as client:
        yield client


class Weather(BaseModel):
    city: str
    degrees: int


def test_create_sync_and_async(sdk: openai.OpenAI, base: str) -> None:
    fields: Any = BASE | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}

    async def work() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none") as client:
            whole = await client.responses.create(**fields)
            events = [event async for event in await client.responses.create(**fields, stream=True)]
            return whole, events[-1].response

    for answer in (sdk.responses.create(**fields), *asyncio.run(work())):
        assert answer.output_text == TEXT
        (message,) = answer.output
        assert b"".join(bytes(each.bytes) for each in message.content[0].logprobs).decode() == TEXT


def test_the_stream_helper_adds_the_pieces_up(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="duo", input="a b c") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == TEXT


def test_parse_reads_a_model(sdk: openai.OpenAI, runtime: FakeRuntime) -> None:
    runtime.script = ('{"city": "Oslo"', ', "degrees": 21}')
    wanted = Weather(city="Oslo", degrees=21)
    assert sdk.responses.parse(model="duo", input="x", text_format=Weather).output_parsed == wanted
    form = runtime.seen[0].params.form
    assert form is not None
    assert json.loads(form.source)["required"] == ["city", "degrees"]
    with sdk.responses.stream(model="duo", input="x", text_format=Weather) as stream:
        assert stream.get_final_response().output_parsed == wanted


def test_a_loop_of_function_calls(sdk: openai.OpenAI, runtime: FakeRuntime) -> None:
    """Output items go back as they came, with what the function returned; whole, and as a stream."""
    items: list[Any] = [{"role": "user", "content": "How warm is it in Oslo?"}]
    runtime.script = ("Let me see.", *CALL)
    first = sdk.responses.create(model="duo", input=items, tools=[TOOL])
    message, call = first.output
    assert (message.type, call.type) == ("message", "function_call")
    assert json.loads(call.arguments) == {"city": "Oslo"}  # type: ignore[union-attr]
    items += [*first.output, {"type": "function_call_output", "call_id": "call_1", "output": "21"}]
    runtime.script = ("21 degrees.",)
    with sdk.responses.stream(model="duo", input=items, tools=[TOOL]) as stream:
        assert stream.get_final_response().output_text == "21 degrees."
    user, turn, result = runtime.seen[1].prompt.messages  # type: ignore[union-attr]
    assert (user["role"], turn["content"]) == ("user", "Let me see.")
    assert turn["tool_calls"][0]["function"] == {"name": "warmth", "arguments": {"city": "Oslo"}}
    assert (result["tool_call_id"], result["content"]) == ("call_1", "21")
    runtime.script = CALL
    with sdk.responses.stream(model="duo", input=items[:1], tools=[TOOL]) as stream:
        grown = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (parsed,) = stream.get_final_response().output
    assert grown == ['{"city"', '{"city": "Oslo"}']
    assert parsed.parsed_arguments == {"city": "Oslo"}  # type: ignore[union-attr]


def test_turns_go_back_as_they_came(sdk: openai.OpenAI, runtime: FakeRuntime) -> None:
    first = sdk.responses.create(model="duo", input="a b c")
    again: Any = [{"role": "user", "content": "a b c"}, *first.output, {"role": "user", "content": "d"}]
    sdk.responses.create(model="duo", input=again)
    assert [dict(each) for each in runtime.seen[1].prompt.messages] == [  # type: ignore[union-attr]
        {"role": "user", "content": "a b c"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "d"},
    ]


def test_errors_are_the_clients_own_classes(sdk: openai.OpenAI, runtime: FakeRuntime) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(model="duo", input="x", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        sdk.responses.create(model="nope", input="x")
    runtime.breaks = NotReadyError("stopping")
    events = list(sdk.responses.create(model="duo", input="x", stream=True))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]

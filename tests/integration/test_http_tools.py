"""Tools in /v1/chat/completions through the whole app, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_runtime import FakeRuntime, live_server
from starlette.testclient import TestClient
from tool_cases import WEATHER

from ensemble_core.decoding.requests import Conversation
from ensemble_core.server_config import ServerConfig
from ensemble_core.text.tools import NO_PARAMETERS, CallPiece, Tool, ToolUse
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

USER = {"role": "user", "content": "Is it warm?"}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": WEATHER, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
NOW = {"type": "function", "function": {"name": "now"}}
BASE: dict[str, Any] = {"model": "duo", "messages": [USER], "tools": [TOOL, NOW]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
TURN = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21 C", "tool_call_id": "call_1"}
NAMED = {"type": "function", "function": {"name": "now"}}
JSON = {"Content-Type": "application/json"}
ALLOWED: dict[str, Any] = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
SCRIPT = (
    "Let me",
    " see.",
    CallPiece(0, "", "get_weather", "call_a"),
    CallPiece(0, '{"city": '),
    CallPiece(0, '"Oslo"}'),
    CallPiece(1, "", "now", "call_b"),
    CallPiece(1, "{}"),
)


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime(script=SCRIPT)


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    app = create_app(runtime, ServerConfig(max_choices=8), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def sdk(runtime: FakeRuntime) -> Iterator[openai.OpenAI]:
    with live_server(runtime) as base:
        yield openai.OpenAI(base_url=f"{base}/v1", api_key="unused", max_retries=0)


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", content=json.dumps(BASE | fields), headers=JSON)


def asked(runtime: FakeRuntime) -> Conversation:
    prompt = runtime.seen[-1].prompt
    assert isinstance(prompt, Conversation)
    return prompt


def test_a_whole_answer_with_calls(client: TestClient) -> None:
    (choice,) = post(client).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert {name: value for name, value in choice["message"].items() if value is not None} == {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {
                "id": "call_a",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
            },
            {"id": "call_b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    }


def test_calls_alone_have_null_content(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.script = SCRIPT[2:]
    for index, choice in enumerate(post(client, n=2).json()["choices"]):
        assert (choice["index"], choice["message"]["content"]) == (index, None)
        assert len(choice["message"]["tool_calls"]) == 2


def test_the_stream(client: TestClient) -> None:
    *bodies, done = post(client, stream=True).text.split("\n\n")[:-1]
    chunks = [json.loads(body.removeprefix("data: ")) for body in bodies]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    opened = {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    assert deltas == [
        {"role": "assistant", "content": "Let me"},
        {"content": " see."},
        {"tool_calls": [{"index": 0, **opened}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
        {
            "tool_calls": [
                {"index": 1, "id": "call_b", "type": "function", "function": {"name": "now", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["tool_calls"]
    assert done == "data: [DONE]"


def test_the_stream_of_calls_alone_begins_with_the_role(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.script = SCRIPT[2:3]
    (first, _) = post(client, stream=True).text.split("\n\n")[:-1]
    delta = json.loads(first.removeprefix("data: "))["choices"][0]["delta"]
    assert (delta["role"], delta.get("content")) == ("assistant", None)
    assert delta["tool_calls"][0]["id"] == "call_a"


def test_every_token_has_its_log_probability_also_in_calls(client: TestClient) -> None:
    (choice,) = post(client, logprobs=True).json()["choices"]
    assert len(choice["logprobs"]["content"]) == len(SCRIPT)


TOOLS = (Tool("get_weather", "The weather.", json.dumps(WEATHER, ensure_ascii=False)), Tool("now"))


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, ToolUse(TOOLS)),
        ({"tool_choice": None, "parallel_tool_calls": None}, ToolUse(TOOLS)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolUse(TOOLS, parallel=False)),
        ({"tool_choice": "none"}, ToolUse(TOOLS, "none")),
        ({"tool_choice": "required"}, ToolUse(TOOLS, "required")),
        ({"tool_choice": NAMED}, ToolUse(TOOLS, "required", ("now",), parallel=False)),
        ({"tool_choice": NAMED, "parallel_tool_calls": True}, ToolUse(TOOLS, "required", ("now",))),
        ({"tool_choice": ALLOWED}, ToolUse(TOOLS, "auto", ("now",))),
        ({"tool_choice": {"function": {"name": "now"}}}, ToolUse(TOOLS, "required", ("now",), False)),
        ({"tools": [{"function": FUNCTION}, {"function": {"name": "now"}}]}, ToolUse(TOOLS)),
        ({"tools": []}, None),
        ({"tools": None, "tool_choice": "auto"}, None),
        ({"tools": None, "tool_choice": "none", "parallel_tool_calls": True}, None),
    ],
)
def test_tools_reach_the_engine(
    client: TestClient, runtime: FakeRuntime, fields: dict[str, Any], use: ToolUse | None
) -> None:
    assert post(client, **fields).status_code == 200
    assert asked(runtime).tools == use
    assert Tool("now").parameters == NO_PARAMETERS


@pytest.mark.parametrize("turn", [TURN, {"role": "assistant", "tool_calls": [CALL]}, TURN | {"content": ""}])
def test_calls_and_results_of_earlier_turns_reach_the_templates(
    client: TestClient, runtime: FakeRuntime, turn: dict[str, Any]
) -> None:
    messages = [USER, turn, RESULT | {"content": [{"type": "text", "text": "21 C"}]}]
    assert post(client, messages=messages, tools=None).status_code == 200
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert asked(runtime).messages == (
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"function": function}]},
        RESULT | {"name": "get_weather"},
    )


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [NOW, {"type": "function", "function": {"name": "f"} | fields}]}


def called(**fields: Any) -> dict[str, Any]:
    changed = CALL | {"function": CALL["function"] | fields}  # type: ignore[operator]
    return {"messages": [USER, TURN | {"tool_calls": [changed]}]}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"properties": {"a": DEEP}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [NOW] * 129}, "tools", "up to 128 tools"),
    ({"tools": "none"}, "tools", "list"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "'function'"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
    ({"tools": [NOW, NOW]}, "tools.1.function.name", "names two tools"),
    (function(name="a b"), "tools.1.function.name", "1 to 64 letters"),
    (function(name="x" * 65), "tools.1.function.name", "1 to 64 letters"),
    (function(description=5), "tools.1.function.description", "string"),
    (function(parameters=[]), "tools.1.function.parameters", "JSON schema"),
    (function(parameters={"type": "array"}), "tools.1.function.parameters", 'type "object"'),
    (function(parameters=DEEP), "tools.1.function.parameters", "64 levels"),
    (function(parameters={"title": "x" * 262_144}), "tools", "262144 characters of JSON"),
    (function(parameters={"title": "\ud800"}), "tools.1.function.parameters", "surrogates"),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "no tools were sent"),
    ({"tools": None, "tool_choice": NAMED}, "tool_choice", "no tools were sent"),
    ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "function must be sent with type function"),
    ({"tool_choice": NAMED | {"function": {"name": "x"}}}, "tool_choice.function.name", "'now'"),
    (
        {"tool_choice": ALLOWED | {"allowed_tools": {"mode": "auto", "tools": [NAMED, named("x")]}}},
        "tool_choice.allowed_tools.tools.1.function.name",
        "not among the tools",
    ),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
    ({"messages": [USER, RESULT]}, "messages.1.tool_call_id", "no call of a message before"),
    ({"messages": [RESULT, TURN]}, "messages.0.tool_call_id", "no call of a message before"),
    ({"messages": [USER | {"tool_call_id": "x"}]}, "messages.0.tool_call_id", "role tool alone"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "required"),
    ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages.0", "role assistant alone"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages.1.content", "must be a string"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages.1.content", "required"),
    ({"messages": [USER, TURN | {"tool_calls": [CALL] * 129}]}, "messages.1.tool_calls", "at most 128"),
    (called(arguments="{"), "messages.1.tool_calls.0.function.arguments", "JSON text of an object"),
    (called(arguments="[1]"), "messages.1.tool_calls.0.function.arguments", "JSON text of an object"),
    (called(arguments={"a": 1}), "messages.1.tool_calls.0.function.arguments", "must be a string"),
    (called(name="a b"), "messages.1.tool_calls.0.function.name", "1 to 64 letters"),
    (
        {"messages": [USER, TURN], "continue_final_message": True, "add_generation_prompt": False},
        "continue_final_message",
        "tool_calls",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(
    client: TestClient, runtime: FakeRuntime, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = post(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert not runtime.seen


def test_earlier_calls_need_no_type(client: TestClient, runtime: FakeRuntime) -> None:
    calls = [{name: value for name, value in CALL.items() if name != "type"}]
    assert post(client, messages=[USER, TURN | {"tool_calls": calls}, RESULT]).status_code == 200
    assert asked(runtime).messages[1]["tool_calls"][0]["type"] == "function"


def test_empty_arguments_are_an_empty_object(client: TestClient, runtime: FakeRuntime) -> None:
    assert post(client, **called(arguments="")).status_code == 200
    assert asked(runtime).messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_the_sdk_reads_calls(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(**BASE)
    calls = answer.choices[0].message.tool_calls or []
    assert [(call.id, call.type) for call in calls] == [("call_a", "function"), ("call_b", "function")]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_the_sdks_stream_helper_adds_the_pieces_up(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(**BASE) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert [(event.name, event.index, event.arguments) for event in done] == [
        ("get_weather", 0, '{"city": "Oslo"}'),
        ("now", 1, "{}"),
    ]
    assert final.message.content == "Let me see."
    assert [(call.id, call.function.name) for call in final.message.tool_calls or []] == [
        ("call_a", "get_weather"),
        ("call_b", "now"),
    ]
    assert final.finish_reason == "tool_calls"


def test_tools_count_in_tokenize(client: TestClient) -> None:
    body = {"model": "duo", "messages": [USER, TURN, RESULT], "tools": [TOOL]}
    assert client.post("/tokenize", json=body).status_code == 200
    wrong = client.post("/tokenize", json=body | {"tools": [{"type": "function"}]})
    assert wrong.json()["error"]["param"] == "tools.0.function"

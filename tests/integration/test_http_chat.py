"""POST /v1/chat/completions and the tokenizer routes through the whole app, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_runtime import VOCAB_SIZE, FakeRuntime
from starlette.testclient import TestClient

from ensemble_core.decoding.requests import Conversation
from ensemble_core.errors import InvalidRequestError, MemberError, NotReadyError, QueueFullError
from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

JSON = {"Content-Type": "application/json"}

USER = {"role": "user", "content": "a b c"}
BEGUN = {"role": "assistant", "content": "Well,"}
BASE: dict[str, Any] = {"model": "duo", "messages": [USER]}
TEXT = " Hello wörld 😀!"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    app = create_app(runtime, ServerConfig(max_choices=8), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost", headers=JSON) as client:
        yield client


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json=BASE | fields)


def chunks(text: str) -> list[dict[str, Any]]:
    *bodies, done = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    assert done == "[DONE]"
    return [json.loads(body) for body in bodies]


MESSAGE_NULLS = ("refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content")


def test_the_answer_has_exactly_the_contracts_fields(client: TestClient) -> None:
    answer = post(client).json()
    told = {"id", "object", "created", "model", "choices", "usage"}
    nulls = {"service_tier", "system_fingerprint", "kv_transfer_params", "prompt_token_ids", "prompt_logprobs"}
    assert set(answer) == told | nulls
    assert all(answer[name] is None for name in nulls)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT} | dict.fromkeys(MESSAGE_NULLS),
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
        }
    ]
    assert answer["usage"]["completion_tokens"] == 4


def test_the_stream(client: TestClient) -> None:
    received = chunks(post(client, stream=True, stream_options={"include_usage": True}).text)
    *texts, last = received
    assert {chunk["object"] for chunk in received} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in texts]
    assert [delta.get("role") for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta["content"] for delta in deltas) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in texts] == [None, None, None, "stop"]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] > 4


def test_without_a_limit_the_answer_may_fill_the_context(client: TestClient, runtime: FakeRuntime) -> None:
    num_prompt_tokens = post(client).json()["usage"]["prompt_tokens"]
    assert runtime.seen[0].params.max_tokens == 512 - num_prompt_tokens
    post(client, model="b")
    assert runtime.seen[1].params.max_tokens == 1024 - num_prompt_tokens


def test_the_answer_goes_on_from_the_last_message(client: TestClient, runtime: FakeRuntime) -> None:
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    assert post(client, messages=[USER, BEGUN], **flags).status_code == 200
    assert runtime.seen[0].prompt == Conversation((USER, BEGUN), continue_final=True)


def test_logprobs_in_chats_own_format(client: TestClient) -> None:
    (choice,) = post(client, logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == TEXT
    assert content[1]["bytes"] == list(" wörld".encode())
    assert [len(token["top_logprobs"]) for token in content] == [2] * 4
    assert content[0]["top_logprobs"][0] == {name: content[0][name] for name in ("token", "logprob", "bytes")}


def test_json_schemas_reach_the_engine_as_text(client: TestClient, runtime: FakeRuntime) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert post(client, response_format=wanted).status_code == 200
    form = runtime.seen[0].params.form
    assert form is not None
    assert (form.kind, json.loads(form.source), form.field) == ("json", schema, "response_format")


IMAGE = [{"type": "image_url", "image_url": {"url": "data:,x"}}]
BAD = [
    ({"model": "nope"}, 404, "model", "unknown"),
    ({"model": "nope", "max_tokens": 5}, 404, "model", "unknown"),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": None}, 400, "messages", "list"),
    ({"messages": "hi"}, 400, "messages", "list"),
    ({"messages": ["hi"]}, 400, "messages.0", "dictionary"),
    ({"messages": [{"content": "x"}]}, 400, "messages.0.role", "required"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages.0.role", "'user'"),
    ({"messages": [{"role": "user", "content": IMAGE}]}, 400, "messages.0.content", "'image_url'"),
    ({"messages": [USER, BEGUN | {"function_call": {"name": "f"}}]}, 400, "messages.1", "function_call"),
    ({"messages": [{"role": "user", "content": "a " * 600}]}, 400, "messages", "context"),
    ({"messages": [{"role": "user", "content": "a " * 600}], "max_tokens": 5}, 400, "messages", "context"),
    ({"max_tokens": 512}, 400, "max_tokens", "context"),
    ({"max_completion_tokens": 512}, 400, "max_completion_tokens", "max_completion_tokens: the context"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "max_completion_tokens must be"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1 to"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "send one of them"),
    ({"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
    ({"function_call": {"name": "f"}}, 400, "function_call", "not supported"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", 'send ["text"]'),
    ({"audio": {"voice": "x"}}, 400, "audio", "not supported"),
    ({"logprobs": 5}, 400, "logprobs", "boolean"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"n": 9}, 400, "n", "at most 8"),
    ({"best_of": 2}, 400, "best_of", "not supported"),
    ({"echo": True}, 400, "echo", "not supported"),
    ({"suffix": 5, "temperature": 3}, 400, "temperature", "from 0 to 2"),
    ({"continue_final_message": True}, 400, "continue_final_message", "add_generation_prompt: false"),
    ({"add_generation_prompt": False}, 400, "add_generation_prompt", "continue_final_message"),
    ({"response_format": "json"}, 400, "response_format", "dictionary"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "'json_object'"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema must be sent"),
    ({"ensemble": {"mode": {"name": "lockstep", "pace": 3}}}, 400, "ensemble.mode.pace", "pace"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "status", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(
    client: TestClient,
    runtime: FakeRuntime,
    fields: dict[str, Any],
    status: int,
    param: str,
    words: str,
    stream: bool,
) -> None:
    answer = post(client, stream=stream, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert words in error["message"]
    assert runtime.seen == []


def test_a_schema_that_the_engine_cannot_follow_is_a_refusal(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.refuse = InvalidRequestError("response_format: not a JSON schema", "response_format")
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    answer = post(client, response_format=wanted)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFullError("full"), 429), (NotReadyError("loading"), 503), (MemberError("a", "broke"), 500)],
)
def test_what_the_engine_refuses(client: TestClient, runtime: FakeRuntime, error: Exception, status: int) -> None:
    runtime.refuse = error
    answer = post(client)
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status != 500)


def test_messages_are_logged_nowhere_above_debug(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        post(client, messages=[{"role": "user", "content": "a secret"}])
        post(client, messages=[{"role": "user", "content": ["a secret"]}])
        client.post("/tokenize", json={"prompt": "a secret"})
    assert caplog.records
    assert "secret" not in caplog.text


def test_tokenize_and_detokenize_undo_each_other(client: TestClient) -> None:
    ids = {"tokens": [5, 17, 9999]}
    text = client.post("/detokenize", json={"model": "a"} | ids).json()
    assert text == {"prompt": " t5 t17 t9999"}
    answer = client.post("/tokenize", json={"model": "a", "add_special_tokens": False} | text).json()
    assert answer == {"count": 3, "max_model_len": 512, "token_strs": None} | ids


def test_tokenize_adds_special_tokens_and_tells_texts_where_asked(client: TestClient) -> None:
    answer = client.post("/tokenize", json={"model": "b", "prompt": "p q", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["<s>", "p", " q"]
    assert (answer["count"], answer["max_model_len"]) == (3, 1024)


def test_tokenize_reads_messages_as_chat_does(client: TestClient) -> None:
    counted = client.post("/tokenize", json={"model": "duo", "messages": [USER]}).json()["count"]
    assert counted == post(client).json()["usage"]["prompt_tokens"]
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    assert client.post("/tokenize", json={"messages": [USER, BEGUN]} | flags).status_code == 200


def test_without_a_model_the_first_one_answers(client: TestClient) -> None:
    assert client.post("/tokenize", json={"prompt": "p"}).json()["max_model_len"] == 512
    assert client.get("/tokenizer_info").json() == client.get("/tokenizer_info?model=duo").json()


def test_tokenizer_info(client: TestClient) -> None:
    info = client.get("/tokenizer_info", params={"model": "b"}).json()
    assert (info["name"], info["vocab_size"], info["chat_template"]) == ("b", VOCAB_SIZE, None)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"prompt": "p", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": "p", "messages": [USER]}, 400, None),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"prompt": "p", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "5"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model"),
        ("/detokenize", {"tokens": [1], "model": 5}, 400, "model"),
    ],
)
def test_bad_input_to_the_tokenizer_routes(
    client: TestClient, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = client.post(path, content=json.dumps(body).encode())
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_the_tokenizer_of_an_unknown_model(client: TestClient) -> None:
    assert client.get("/tokenizer_info?model=nope").json()["error"]["code"] == "model_not_found"


def test_tokenizers_while_loading(client: TestClient, runtime: FakeRuntime) -> None:
    runtime.state = "loading"
    assert client.post("/tokenize", json={"prompt": "p"}).status_code == 503
    assert post(client).status_code == 503

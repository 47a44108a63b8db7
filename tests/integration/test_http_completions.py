"""POST /v1/completions through the whole app, over a scripted engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fake_runtime import FakeRuntime
from pydantic import SecretStr
from starlette.testclient import TestClient

from ensemble_core.decoding.requests import Output
from ensemble_core.errors import MemberError, NotReadyError, QueueFullError
from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.logs import RequestIdFilter
from server.edge.metrics import PrometheusMetrics

JSON = {"Content-Type": "application/json"}

CONFIG = ServerConfig(max_choices=8, max_body_bytes=4096)
BASE: dict[str, Any] = {"model": "duo", "prompt": "a b c"}


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    app = create_app(runtime, CONFIG, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost", headers=JSON) as client:
        yield client


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json=BASE | fields)


def events(text: str) -> list[str]:
    """The data of each event; every event is one line."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def chunks(text: str) -> list[dict[str, Any]]:
    *bodies, done = events(text)
    assert done == "[DONE]"
    return [json.loads(body) for body in bodies]


def usage_of(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_the_answer_has_exactly_the_contracts_fields(client: TestClient) -> None:
    answer = post(client).json()
    told = {"id", "object", "created", "model", "choices", "usage"}
    nulls = {"service_tier", "system_fingerprint", "kv_transfer_params"}
    assert set(answer) == told | nulls
    assert all(answer[name] is None for name in nulls)
    assert (answer["object"], answer["model"]) == ("text_completion", "duo")
    assert answer["choices"] == [
        {
            "index": 0,
            "text": " Hello wörld 😀!",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]
    assert answer["usage"] == usage_of(3, 4)


def test_the_stream_has_the_same_text_and_its_headers(client: TestClient) -> None:
    answer = post(client, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    received = chunks(answer.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in received) == " Hello wörld 😀!"
    assert [chunk["choices"][0]["finish_reason"] for chunk in received] == [None, None, None, "stop"]
    assert received[-1]["choices"][0]["text"] == "!"  # the reason comes with the last text
    assert len({chunk["id"] for chunk in received}) == 1
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in received)


def test_usage_in_streams(client: TestClient) -> None:
    *texts, last = chunks(post(client, stream=True, stream_options={"include_usage": True}).text)
    assert [chunk["usage"] for chunk in texts] == [None] * 4
    assert last["choices"] == []
    assert last["usage"] == usage_of(3, 4)
    both = {"include_usage": True, "continuous_usage_stats": True}
    counts = [c["usage"]["completion_tokens"] for c in chunks(post(client, stream=True, stream_options=both).text)]
    assert counts == [1, 2, 3, 4, 4]


def test_choices_of_several_prompts(client: TestClient, runtime: FakeRuntime) -> None:
    answer = post(client, prompt=["p q", "r"], n=2, seed=5).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == usage_of(3, 16)
    assert [(each.prompt, each.params.seed) for each in runtime.seen] == [
        ("p q", 5),
        ("p q", 6),
        ("r", 5),
        ("r", 6),
    ]
    assert [each.request_id for each in runtime.seen] == [f"{answer['id']}-{i}" for i in range(4)]


CONTENT_TYPES = ["text/plain", "application/x-www-form-urlencoded", "nonsense", None]


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", *CONTENT_TYPES])
def test_with_keys_any_content_type_is_read_as_json(runtime: FakeRuntime, content_type: str | None) -> None:
    app = create_app(runtime, ServerConfig(api_keys=(SecretStr("k"),)), PrometheusMetrics())  # type: ignore[arg-type]
    headers = {"Authorization": "Bearer k"} | ({} if content_type is None else {"Content-Type": content_type})
    with TestClient(app) as client:
        answer = client.post("/v1/completions", content=json.dumps(BASE).encode(), headers=headers)
        assert answer.status_code == 200
        broken = client.post("/v1/completions", content=b"{", headers=headers)
        assert broken.status_code == 400
        assert "not valid JSON" in broken.json()["error"]["message"]


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_without_keys_only_json_is_read(runtime: FakeRuntime, content_type: str | None) -> None:
    """A web page may send any other type to any address without asking."""
    app = create_app(runtime, ServerConfig(), PrometheusMetrics())  # type: ignore[arg-type]
    headers = {} if content_type is None else {"Content-Type": content_type}
    with TestClient(app, base_url="http://localhost") as client:
        answer = client.post("/v1/completions", content=json.dumps(BASE).encode(), headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]
    assert not runtime.seen


BAD = [
    ({"model": "nope"}, 404, "model", "unknown"),
    ({"model": None}, 400, "model", "string"),
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": []}, 400, "prompt", "empty"),
    ({"prompt": ["a", ""]}, 400, "prompt", "empty"),
    ({"prompt": None}, 400, "prompt", "string"),
    ({"prompt": [[]]}, 400, "prompt", "empty"),
    ({"prompt": [[1], []]}, 400, "prompt", "empty"),
    ({"prompt": [1, "a"]}, 400, "prompt", "valid integer"),
    ({"prompt": [True]}, 400, "prompt", "valid integer"),
    ({"prompt": [-1]}, 400, "prompt", "from 0 to"),
    ({"prompt": [10**30]}, 400, "prompt", "from 0 to"),
    ({"prompt": [10_000]}, 400, "prompt", "10000"),  # outside the vocabulary
    ({"prompt": "a " * 600}, 400, "prompt", "context"),
    ({"max_tokens": 510}, 400, "max_tokens", "context"),
    ({"prompt": "\ud800"}, 400, "prompt", "surrogates"),
    ({"prompt": ["a"] * 9}, 400, "prompt", "at most 8"),
    ({"n": 9}, 400, "n", "at most 8"),
    ({"n": 10**30}, 400, "n", "at most 8"),
    ({"n": 0}, 400, "n", "at least 1"),
    ({"n": "2"}, 400, "n", "(given: '2')"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1 to"),
    ({"max_tokens": -1}, 400, "max_tokens", "got -1"),
    ({"max_tokens": "many"}, 400, "max_tokens", "valid integer (given: 'many')"),
    ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
    ({"max_tokens": 10**100}, 400, "max_tokens", "from 1 to"),
    ({"temperature": 2.1}, 400, "temperature", "from 0 to 2, got 2.1"),
    ({"temperature": -0.1}, 400, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, 400, "temperature", "valid number (given: 'hot')"),
    ({"temperature": 10**400}, 400, "temperature", "number"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"top_p": 1.1}, 400, "top_p", "from 0 to 1"),
    ({"seed": 2**63}, 400, "seed", "integer from"),
    ({"seed": 0.5}, 400, "seed", "integer"),
    ({"stop": ["x"] * 17}, 400, "stop", "up to 16 strings, got 17"),
    ({"stop": ""}, 400, "stop", "1 to 1024 characters"),
    ({"stop": "x" * 1025}, 400, "stop", "1 to 1024 characters"),
    ({"stop": [1]}, 400, "stop", "string"),
    ({"stop": "\udc00"}, 400, "stop", "surrogates"),
    ({"stream": "yes"}, 400, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream: true"),
    (
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        400,
        "stream_options.include_usage",
        "boolean (given: 'yes')",
    ),
    ({"stream": True, "stream_options": []}, 400, "stream_options", "dictionary"),
    ({"logprobs": -1}, 400, "logprobs", "from 0 to 20"),
    ({"logprobs": 21}, 400, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, 400, "logprobs", "valid integer"),
    ({"echo": "yes"}, 400, "echo", "boolean"),
    ({"max_tokens": -1, "echo": True}, 400, "max_tokens", "from 0 to"),
    ({"best_of": 0}, 400, "best_of", "at least n = 1"),
    ({"best_of": 1, "n": 2}, 400, "best_of", "at least n = 2"),
    ({"best_of": 9}, 400, "best_of", "at most 8"),
    ({"best_of": 2, "stream": True}, 400, "best_of", "cannot be streamed"),
    ({"suffix": "x"}, 400, "suffix", "not supported"),
    ({"presence_penalty": 2.1}, 400, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -2.1}, 400, "frequency_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "from 0.01 to 10"),
    ({"top_k": -2}, 400, "top_k", "from 0 to"),
    ({"top_k": 2**31}, 400, "top_k", "from 0 to"),
    ({"min_p": -0.1}, 400, "min_p", "from 0 to 1"),
    ({"min_tokens": -1}, 400, "min_tokens", "from 0 to"),
    ({"min_tokens": 17}, 400, "min_tokens", "from 0 to 16"),
    ({"ignore_eos": "no"}, 400, "ignore_eos", "boolean"),
    ({"stop_token_ids": [2**31]}, 400, "stop_token_ids", "from 0 to"),
    ({"stop_token_ids": [10_000]}, 400, "stop_token_ids", "10000"),
    ({"stop_token_ids": [1] * 65}, 400, "stop_token_ids", "up to 64 entries, got 65"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", "decimal digits"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"10000": 1}}, 400, "logit_bias", "10000"),
    ({"logit_bias": [[1, 2]]}, 400, "logit_bias", "object"),
    ({"return_token_ids": 1}, 400, "return_token_ids", "boolean"),
    ({"guided_whitespace_pattern": " "}, 400, "guided_whitespace_pattern", "leave it out or send null"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, 400, "guided_json", "response_format and"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice", "send one of them"),
    ({"structured_outputs": {"structural_tag": "x"}}, 400, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"choice": []}}, 400, "structured_outputs.choice", "1 to"),
    ({"allowed_token_ids": []}, 400, "allowed_token_ids", "empty"),
    ({"allowed_token_ids": [10000]}, 400, "allowed_token_ids", "10000"),
    ({"bad_words": [""]}, 400, "bad_words", "1 to 256"),
    ({"user": 5}, 400, "user", "string"),
    ({"ensemble": []}, 400, "ensemble", "dictionary"),
    (
        {"ensemble": {"colour": 1}},
        400,
        "ensemble.colour",
        "takes fusion, limits, members, mode, trace, weighting, weights",
    ),
    ({"ensemble": {"trace": "yes"}}, 400, "ensemble.trace", "boolean"),
    ({"ensemble": {"members": "a"}}, 400, "ensemble.members", "list"),
    ({"ensemble": {"members": []}}, 400, "ensemble.members", "at least 1"),
    ({"ensemble": {"members": ["a", 5]}}, 400, "ensemble.members.1", "string"),
    ({"ensemble": {"weights": {"a": -1}}}, 400, "ensemble.weights.a", "greater than or equal to 0"),
    ({"ensemble": {"weights": {"a": "1"}}}, 400, "ensemble.weights.a", "number"),
    ({"ensemble": {"weighting": "best"}}, 400, "ensemble.weighting.by", "'fixed', 'perplexity' or 'gate'"),
    ({"ensemble": {"weighting": {"by": "perplexity", "tau": 0}}}, 400, "ensemble.weighting.tau", "greater than 0"),
    ({"ensemble": {"weighting": {"tau": 1}}}, 400, "ensemble.weighting.by", "required"),
    ({"ensemble": {"mode": {"name": "lockstep", "pace": 3}}}, 400, "ensemble.mode.pace", "pace"),
    ({"ensemble": {"fusion": {"options": {}}}}, 400, "ensemble.fusion.name", "required"),
    ({"ensemble": {"fusion": {"name": "x", "more": 1}}}, 400, "ensemble.fusion.more", "unknown key"),
    ({"ensemble": {"fusion": 5}}, 400, "ensemble.fusion", "(given: 5)"),
]


@pytest.mark.parametrize(("fields", "status", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input(
    client: TestClient, runtime: FakeRuntime, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    answer = client.post("/v1/completions", content=json.dumps(BASE | fields).encode())
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert runtime.seen == []
    assert post(client).status_code == 200  # the server lives on


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"null", b'"text"', b"5", b"\xff", b"[" * 4000, b'{"model": 1e999999, "n": }']
)
def test_bodies_that_are_no_objects(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(client: TestClient, number: str) -> None:
    body = json.dumps(BASE)[:-1] + f', "temperature": {number}}}'
    answer = client.post("/v1/completions", content=body.encode())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_missing_fields_are_named(client: TestClient, field: str) -> None:
    body = {name: value for name, value in BASE.items() if name != field}
    error = client.post("/v1/completions", json=body).json()["error"]
    assert error["param"] == field
    assert "required" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFullError("256 are waiting"), 429),
        (NotReadyError("loading member a"), 503),
        (MemberError("a", "broke"), 500),
        (RuntimeError("a bug"), 500),
    ],
)
def test_what_the_engine_refuses(
    client: TestClient, runtime: FakeRuntime, error: Exception, status: int, stream: bool
) -> None:
    runtime.refuse = error
    answer = post(client, stream=stream)
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert "error" in answer.json()
    assert "bug" not in answer.text
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_output_are_statuses(
    client: TestClient, runtime: FakeRuntime, stream: bool
) -> None:
    runtime.outputs["a b c"] = [Output("", (), 3, 0, "error", error="member 'b' ran dry")]
    answer = post(client, stream=stream)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "member 'b' ran dry"


@pytest.mark.parametrize("error", [MemberError("b", "ran dry"), RuntimeError("a bug")])
def test_failures_after_the_headers_are_events(client: TestClient, runtime: FakeRuntime, error: Exception) -> None:
    runtime.breaks = error
    answer = post(client, stream=True)
    assert answer.status_code == 200
    *texts, failure, done = events(answer.text)
    assert len(texts) == 3
    assert json.loads(failure)["error"]["type"] == "server_error"
    assert done == "[DONE]"
    assert len(runtime.aborted) == 1


def test_bodies_over_the_limit(client: TestClient) -> None:
    large = json.dumps(BASE | {"prompt": "x" * 5000}).encode()

    def pieces() -> Iterator[bytes]:  # sent chunked, without a length
        yield large[:3000]
        yield large[3000:]

    for content in (large, pieces()):
        answer = client.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert "4096 bytes" in answer.json()["error"]["message"]
        assert answer.headers["x-request-id"]


def test_prompts_are_logged_nowhere_above_debug(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        post(client, prompt="a secret")
        post(client, prompt="a secret", temperature=5)
        post(client, prompt=["a secret", 5])
    assert caplog.records
    assert "secret" not in caplog.text


def test_a_failed_member_is_logged_with_the_request_id(
    client: TestClient, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(RequestIdFilter())
    runtime.refuse = MemberError("b", "ran dry")
    client.post("/v1/completions", json=BASE, headers={"X-Request-Id": "mine"})
    (failure,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "member 'b': ran dry" in failure.getMessage()
    assert failure.request_id == "mine"  # type: ignore[attr-defined]


def test_refusals_are_counted(client: TestClient, runtime: FakeRuntime) -> None:
    post(client, n=0)
    post(client, n="x")
    post(client, model="nope")
    client.post("/v1/completions", content=b"x" * 5000)
    client.post("/nope")
    runtime.refuse = QueueFullError("full")
    post(client)
    lines = client.get("/metrics").text.splitlines()
    counts = {x for x in lines if x.startswith("unisono_requests_rejected_total") and not x.endswith(" 0.0")}
    assert counts == {
        'unisono_requests_rejected_total{reason="invalid_request"} 2.0',
        'unisono_requests_rejected_total{reason="model_not_found"} 1.0',
        'unisono_requests_rejected_total{reason="body_too_large"} 1.0',
        'unisono_requests_rejected_total{reason="queue_full"} 1.0',
    }

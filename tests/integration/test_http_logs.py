"""What the log says of requests, hostile ones among them: a real server, real lines."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from captured_logs import captured
from fake_runtime import FakeRuntime, live_server

from ensemble_core.errors import MemberError, NotReadyError
from ensemble_core.server_config import ServerConfig

BASE: dict[str, Any] = {"model": "duo", "prompt": "a secret of mine"}
CHAT: dict[str, Any] = {"model": "duo", "messages": [{"role": "user", "content": "a secret of mine"}]}
RESPONSE: dict[str, Any] = {"model": "duo", "input": "a secret of mine"}
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [a-z_.]+ \[[\x21-\x7e]+\] ")
FORGED = "2026-01-01 00:00:00,000 INFO server.edge.access [admin] FORGED"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    with captured("info") as log:
        yield log


@pytest.fixture
def json_log() -> Iterator[io.StringIO]:
    with captured("info", "json") as log:
        yield log


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def base(runtime: FakeRuntime) -> Iterator[str]:
    with live_server(runtime, ServerConfig(drain_seconds=0.2)) as base:
        yield base


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 5.0
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def access_of(log: io.StringIO) -> list[dict[str, Any]]:
    told = map(json.loads, log.getvalue().splitlines())
    return [each for each in told if each["logger"] == "server.edge.access"]


def last_access(log: io.StringIO, request_id: str) -> dict[str, Any]:
    """The access record of a request; it is written just after the client has its answer."""
    own = wait_for(lambda: [each for each in access_of(log) if each["request_id"] == request_id])
    assert len(own) == 1
    return dict(own[0])


def headers(request_id: str) -> dict[str, str]:
    return {"X-Request-Id": request_id}


def raw(base: str, head: bytes, body: bytes = b"") -> bytes:
    """The answer to bytes that no client library would send."""
    host, _, port = base.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n" + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


QUOTED = FORGED.replace(" ", "%20")


@pytest.mark.parametrize(
    "path", [f"/x%0a{QUOTED}", f"/v1/models/%0d%0a{QUOTED}", "/x%1b%5b2K%9bFORGED", f"/{QUOTED}"]
)
def test_a_path_forges_no_line_and_is_not_logged(base: str, log: io.StringIO, path: str) -> None:
    assert raw(base, f"GET {path} HTTP/1.1".encode()).startswith(b"HTTP/1.1 404")
    wait_for(lambda: " 404 " in log.getvalue())
    assert all(RECORD.match(line) for line in log.getvalue().splitlines())
    assert "FORGED" not in log.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", log.getvalue())


@pytest.mark.parametrize(
    "fields",
    [
        {"ensemble": {f"x\n{FORGED}": 1}},
        {"ensemble": {"weights": {f"x\n{FORGED}": -1}}},
        {"ensemble": {"fusion": {"name": "relative", f"x\n{FORGED}": 1}}},
        {"stream_options": {f"x\u2028{FORGED}": 1}, "stream": True},
        {"model": f"x\n{FORGED}"},
        {"logit_bias": {f"x\n{FORGED}": 1}},
        {"stop": f"x\n{FORGED}", "n": 0},
        {"user": [f"x\n{FORGED}"]},
    ],
)
def test_a_body_forges_no_line_and_its_keys_are_not_logged(
    base: str, log: io.StringIO, fields: dict[str, Any]
) -> None:
    httpx.post(f"{base}/v1/completions", json=BASE | fields)
    wait_for(lambda: "/v1/completions " in log.getvalue())
    assert all(RECORD.match(line) for line in log.getvalue().splitlines())
    assert "FORGED" not in log.getvalue()
    assert "secret" not in log.getvalue()


def test_a_refusal_says_which_declared_field_it_was(base: str, log: io.StringIO) -> None:
    httpx.post(f"{base}/v1/completions", json=BASE | {"ensemble": {"weights": {"mine": -1}}})
    httpx.post(f"{base}/v1/completions", json=BASE | {"temperature": 9})
    httpx.post(f"{base}/v1/completions", json=BASE | {"suffix": "x"})
    said = wait_for(lambda: re.findall(r"refused: status=400 code=None param=(\S+)", log.getvalue()))
    assert said == ["ensemble.weights", "temperature", "suffix"]


def test_a_method_that_nobody_defined_is_not_logged(base: str, log: io.StringIO) -> None:
    assert b" 405 " in raw(base, b"FORGED /v1/completions HTTP/1.1").partition(b"\r\n")[0]
    wait_for(lambda: "_OTHER /v1/completions 405" in log.getvalue())
    assert "FORGED" not in log.getvalue()


def test_an_exception_that_quotes_a_client_begins_no_record(
    base: str, log: io.StringIO, runtime: FakeRuntime
) -> None:
    runtime.refuse = RuntimeError(f"x\n{FORGED}\x1b[2K")
    assert httpx.post(f"{base}/v1/completions", json=BASE, headers=headers("bug")).status_code == 500
    wait_for(lambda: " 500 " in log.getvalue())
    lines = log.getvalue().splitlines()
    assert all(RECORD.match(line) or line.startswith("    ") for line in lines)
    assert [line for line in lines if "FORGED" in line] == [f"    {FORGED}\\x1b[2K"]
    assert "[bug] failed: POST /v1/completions" in log.getvalue()


LONG = "x" * 60_000
LONGEST = "x" * 30_000  # that server.limits.header_bytes lets in


def test_a_path_over_the_limit_is_refused_and_not_echoed(base: str, log: io.StringIO) -> None:
    answer = httpx.get(f"{base}/{LONG}")
    assert answer.status_code == 431
    assert len(answer.content) < 1000
    wait_for(lambda: " 431 " in log.getvalue())
    assert len(log.getvalue()) < 2000


@pytest.mark.parametrize(
    "path",
    [f"/{LONGEST}", f"/v1/models/{LONGEST}", f"/v1/completions/{LONGEST}", f"/tokenizer_info?model={LONGEST}"],
)
def test_a_long_path_is_not_echoed_whole(base: str, log: io.StringIO, path: str) -> None:
    answer = httpx.get(base + path)
    assert answer.status_code == 404
    assert len(answer.content) < 1000
    assert "xxx" in answer.json()["error"]["message"]
    wait_for(lambda: " 404 " in log.getvalue())
    assert len(log.getvalue()) < 2000


@pytest.mark.parametrize(
    "fields",
    [
        {"model": LONG},
        {LONG: 1, "model": LONG},
        {"model": [LONG] * 50},
        {"max_tokens": LONG},
        {"max_tokens": int("9" * 4000)},
        {"temperature": int("9" * 4000)},
        {"ensemble": {LONG: 1}},
        {"ensemble": {"weights": {LONG: -1}}},
        {"ensemble": {"weights": {LONG + str(rank): -1 for rank in range(20)}}},
        {"ensemble": {"fusion": {"name": "relative", LONG: 1}}},
        {"ensemble": {"weighting": {"by": LONG}}},
        {"stream_options": LONG},
        {"prompt": {LONG: LONG}, "messages": {LONG: LONG}},
        {"stop": [LONG]},
        {"logit_bias": {LONG: 1}},
    ],
)
def test_a_long_value_is_not_echoed_whole(base: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{base}/v1/completions", json=BASE | fields)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 3000
    answer = httpx.post(f"{base}/v1/chat/completions", json=CHAT | fields)
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 3000


@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/completions", BASE), ("/v1/chat/completions", CHAT), ("/v1/responses", RESPONSE)]
)
def test_an_answer_has_one_access_record(
    base: str, json_log: io.StringIO, runtime: FakeRuntime, path: str, fields: dict[str, Any]
) -> None:
    runtime.delay = 0.02
    answer = httpx.post(base + path, json=fields, headers=headers("one"))
    told = last_access(json_log, "one")
    assert (told["method"], told["route"], told["status"], told["level"]) == ("POST", path, 200, "INFO")
    assert (told["model"], told["id"]) == ("duo", answer.json()["id"])
    assert told["bytes"] == len(answer.content)
    usage = answer.json()["usage"]
    assert told["prompt_tokens"] == usage["input_tokens" if path == "/v1/responses" else "prompt_tokens"]
    assert told["completion_tokens"] == 4
    assert 0.08 <= told["first_byte"] <= told["seconds"] < 5
    assert {"error", "disconnected"}.isdisjoint(told)
    assert "secret" not in json_log.getvalue()
    assert "Hello" not in json_log.getvalue()


def test_a_stream_is_logged_once_it_ends(base: str, json_log: io.StringIO, runtime: FakeRuntime) -> None:
    runtime.delay = 0.1
    body = BASE | {"stream": True}
    num_bytes = 0
    with httpx.stream("POST", f"{base}/v1/completions", json=body, headers=headers("s")) as answer:
        for rank, part in enumerate(answer.iter_bytes()):
            num_bytes += len(part)
            if rank < 3:  # a tenth of a second before the next
                assert access_of(json_log) == []
    told = last_access(json_log, "s")
    assert (told["status"], told["bytes"], told["completion_tokens"]) == (200, num_bytes, 4)
    assert told["seconds"] >= 0.4
    assert told["first_byte"] < told["seconds"] - 0.2


def test_a_client_that_leaves_its_stream(base: str, json_log: io.StringIO, runtime: FakeRuntime) -> None:
    runtime.endless, runtime.delay = True, 0.01
    body = BASE | {"stream": True}
    with httpx.stream("POST", f"{base}/v1/completions", json=body, headers=headers("left")) as answer:
        next(answer.iter_bytes())
    told = last_access(json_log, "left")
    assert (told["status"], told["disconnected"], told["model"]) == (200, True, "duo")


def test_a_client_that_leaves_before_its_answer(base: str, json_log: io.StringIO, runtime: FakeRuntime) -> None:
    runtime.delay = 60.0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base}/v1/completions", json=BASE, timeout=0.3, headers=headers("left"))
    told = last_access(json_log, "left")
    assert (told["status"], told["disconnected"], told["completion_tokens"]) == (499, True, 0)


def test_a_stream_that_fails_says_so(base: str, json_log: io.StringIO, runtime: FakeRuntime) -> None:
    runtime.breaks = NotReadyError("stopping")
    httpx.post(f"{base}/v1/completions", json=BASE | {"stream": True}, headers=headers("f"))
    told = last_access(json_log, "f")
    assert (told["status"], told["error"]) == (200, "NotReadyError")


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/models/a", "/v1/models/{model_id:path}", 200),
        ("GET", "/v1/models/mine/own", "/v1/models/{model_id:path}", 404),
        ("GET", "/mine", "-", 404),
        ("DELETE", "/v1/completions", "/v1/completions", 405),
    ],
)
def test_routes_are_templates(
    base: str, json_log: io.StringIO, method: str, path: str, route: str, status: int
) -> None:
    httpx.request(method, base + path, headers=headers("r"))
    told = last_access(json_log, "r")
    assert (told["method"], told["route"], told["status"]) == (method, route, status)
    assert "model" not in told
    assert "mine" not in json_log.getvalue()


def test_a_model_is_named_only_once_the_engine_has_accepted_the_request(
    base: str, json_log: io.StringIO, runtime: FakeRuntime
) -> None:
    runtime.refuse = MemberError("b", "ran dry")
    httpx.post(f"{base}/v1/completions", json=BASE, headers=headers("m"))
    told = last_access(json_log, "m")
    assert told["status"] == 500
    assert "model" not in told


@pytest.mark.parametrize("level", ["info", "debug"])
def test_probes_are_at_debug(runtime: FakeRuntime, level: str) -> None:
    with captured(level, "json") as log, live_server(runtime) as base:
        for path in ("/health", "/ready", "/metrics", "/version"):
            httpx.get(base + path)
        wait_for(lambda: [each for each in access_of(log) if each["route"] == "/version"])
        levels = {each["route"]: each["level"] for each in access_of(log)}
    probes = {"/health": "DEBUG", "/ready": "DEBUG", "/metrics": "DEBUG"} if level == "debug" else {}
    assert levels == probes | {"/version": "INFO"}


def test_the_access_log_can_be_off(json_log: io.StringIO, runtime: FakeRuntime) -> None:
    with live_server(runtime, ServerConfig(access_log=False)) as base:
        httpx.get(f"{base}/version")
        httpx.post(f"{base}/v1/completions", json=BASE | {"n": 0})
    assert access_of(json_log) == []
    assert "refused: status=400" in json_log.getvalue()


def test_as_text(base: str, log: io.StringIO) -> None:
    httpx.post(f"{base}/v1/completions", json=BASE, headers=headers("one"))
    line = wait_for(lambda: [each for each in log.getvalue().splitlines() if " server.edge.access " in each])[0]
    assert re.search(
        r" INFO server\.edge\.access \[one\] POST /v1/completions 200 bytes=\d+ seconds=[\d.]+ first_byte=[\d.]+ "
        r"model=duo id=cmpl-[0-9a-f]{32} prompt_tokens=4 completion_tokens=4$",
        line,
    )


def test_behind_a_root_path_the_route_is_the_same(json_log: io.StringIO, runtime: FakeRuntime) -> None:
    with live_server(runtime, ServerConfig(root_path="/llm", drain_seconds=0.2)) as base:
        httpx.post(f"{base}/llm/v1/completions", json=BASE, headers=headers("r"))
        assert last_access(json_log, "r")["route"] == "/v1/completions"


def test_without_a_key_no_route_is_reached(json_log: io.StringIO, runtime: FakeRuntime) -> None:
    with live_server(runtime, ServerConfig(api_keys=("sk-mine",), drain_seconds=0.2)) as base:  # type: ignore[arg-type]
        httpx.post(
            f"{base}/v1/completions", json=BASE, headers=headers("k") | {"Authorization": "Bearer sk-wrong"}
        )
        told = last_access(json_log, "k")
    assert (told["route"], told["status"]) == ("-", 401)
    assert "sk-" not in json_log.getvalue()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/completions/"])
def test_with_a_key_the_route_is_named(json_log: io.StringIO, runtime: FakeRuntime, path: str) -> None:
    with live_server(runtime, ServerConfig(api_keys=("sk-mine",), drain_seconds=0.2)) as base:  # type: ignore[arg-type]
        key = {"Authorization": "Bearer sk-mine"}
        httpx.post(f"{base}{path}", json=BASE, headers=headers("w") | key)
        assert last_access(json_log, "w")["route"] == "/v1/completions"

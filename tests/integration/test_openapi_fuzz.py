"""The server against its own OpenAPI document, and its bodies against any JSON: no 500, no answer out of shape."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fake_runtime import FakeRuntime
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

from ensemble_core.limits import LimitsConfig
from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from server.schema.messages import MessagesRequest
from server.schema.responses import ResponseRequest
from server.schema.tokenizers import DetokenizeRequest, TokenizeRequest

JSON = {"Content-Type": "application/json"}

BOUNDS = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[
        Phase.explicit,
        Phase.generate,
    ],  # the examples of the document, too; shrinking a failure could take minutes
    suppress_health_check=list(HealthCheck),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


class LastingRuntime(FakeRuntime):
    """Starts again after each end of the app, which the fuzzer runs anew for each call."""

    def start(self) -> None:
        self.state, self.aborting = "ready", False


@cache
def runtime() -> FakeRuntime:
    return LastingRuntime()


@cache
def app() -> Any:
    return create_app(runtime(), ServerConfig(max_choices=8, allowed_hosts=("*",)), PrometheusMetrics())  # type: ignore[arg-type]


document = schemathesis.openapi.from_asgi("/openapi.json", app())
statuses: Counter[tuple[str, int]] = Counter()


@document.hook
def map_body(_context: Any, body: Any) -> Any:
    """A model that is there, else next to all requests would end at the first check."""
    return body | {"model": "duo"} if isinstance(body, dict) and isinstance(body.get("model"), str) else body


@document.parametrize()
@BOUNDS
def test_every_route_keeps_its_word(case: Any) -> None:
    answer = case.call()
    statuses[case.path, answer.status_code] += 1
    case.validate_response(answer, checks=CHECKS)
    assert answer.headers["x-request-id"]
    assert runtime().num_open == 0


def test_the_fuzz_went_past_the_checks() -> None:
    if not statuses:
        pytest.skip("runs after the fuzz")
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/detokenize",
    ):
        assert statuses[path, 200], f"{path}: {statuses}"
        assert statuses[path, 400], f"{path}: {statuses}"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    fresh = create_app(FakeRuntime(), ServerConfig(max_choices=8, allowed_hosts=("*",)), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(fresh, raise_server_exceptions=False, base_url="http://localhost", headers=JSON) as client:
        yield client


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ODD = st.sampled_from(
    [0, -1, 1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, "", "\ud800", "1", [], {}, [[]], [0], {"0": 0}]
)
ANY_JSON = st.recursive(
    SCALARS | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = [{"role": "user", "content": "Hi!"}]
ROUTES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"model": "duo", "prompt": "Hi!"}),
    "/v1/chat/completions": (ChatRequest, {"model": "duo", "messages": MESSAGES}),
    "/v1/responses": (ResponseRequest, {"model": "duo", "input": "Hi!"}),
    "/v1/messages": (MessagesRequest, {"model": "duo", "max_tokens": 5, "messages": MESSAGES}),
    "/tokenize": (TokenizeRequest, {"model": "duo", "prompt": "Hi!"}),
    "/detokenize": (DetokenizeRequest, {"model": "duo", "tokens": [1, 2]}),
}


def names_of(kind: type[Any]) -> list[str]:
    return sorted({*kind.model_fields, *getattr(kind, "neutral", {}), *getattr(kind, "ignored", ())})


def check(client: TestClient, path: str, body: object) -> None:
    answer = client.post(path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), body
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ROUTES)
@settings(BOUNDS, max_examples=150)
@given(data=st.data())
def test_any_values_in_the_fields_of_a_body(client: TestClient, path: str, data: st.DataObject) -> None:
    kind, base = ROUTES[path]
    fields = data.draw(st.dictionaries(st.sampled_from(names_of(kind)), ANY_JSON, max_size=4))
    check(client, path, base | fields)


@pytest.mark.parametrize("path", ROUTES)
@settings(BOUNDS, max_examples=50)
@given(body=ANY_JSON)
def test_any_json_as_a_body(client: TestClient, path: str, body: object) -> None:
    check(client, path, body)


@pytest.mark.parametrize("path", ROUTES)
@settings(BOUNDS, max_examples=50)
@given(body=st.binary(max_size=64))
def test_any_bytes_as_a_body(client: TestClient, path: str, body: bytes) -> None:
    assert client.post(path, content=body).status_code == 400


@settings(BOUNDS, max_examples=60)
@given(content=ANY_JSON, role=ANY_JSON, more=ANY_JSON)
def test_any_messages(client: TestClient, content: object, role: object, more: object) -> None:
    for message in (
        {"role": "user", "content": content},
        {"role": role, "content": "x", "tool_calls": more},
        more,
    ):
        check(client, "/v1/chat/completions", {"model": "duo", "messages": [message]})


@settings(BOUNDS, max_examples=60)
@given(schema=ANY_JSON, kind=st.sampled_from(["text", "json_object", "json_schema"]))
def test_any_response_format(client: TestClient, schema: object, kind: str) -> None:
    wanted = {"type": kind, "json_schema": {"name": "x", "schema": schema}}
    check(client, "/v1/chat/completions", {"model": "duo", "messages": MESSAGES, "response_format": wanted})


@cache
def app_with_files() -> Any:
    config = ServerConfig(
        allowed_hosts=("*",), files_folder=Path(tempfile.mkdtemp()), limits=LimitsConfig(files=5)
    )
    return create_app(runtime(), config, PrometheusMetrics())  # type: ignore[arg-type]


of_files = schemathesis.openapi.from_asgi("/openapi.json", app_with_files()).include(
    path_regex="^/v1/(files|batches)"
)


@of_files.parametrize()
@BOUNDS
def test_every_route_of_files_keeps_its_word(case: Any) -> None:
    case.validate_response(case.call(), checks=CHECKS)

"""Models, probes, metrics, documentation, and what every route has in common."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from fake_runtime import MODELS, RECIPE, FakeRuntime
from processes import tool
from pydantic import SecretStr
from starlette.testclient import TestClient

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

HERE = "http://localhost"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def client(runtime: FakeRuntime) -> Iterator[TestClient]:
    app = create_app(runtime, ServerConfig(), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url=HERE) as client:
        yield client


def test_models(client: TestClient) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == ["duo", "a", "b"]
    assert answer["data"][0]["recipe"] == RECIPE
    assert answer["data"][2] == client.get("/v1/models/b").json()
    assert (answer["data"][2]["max_model_len"], answer["data"][2]["kind"]) == (1024, "member")
    assert all(model["root"] == model["id"] for model in answer["data"])
    (permission,) = answer["data"][0]["permission"]
    assert (permission["object"], permission["allow_sampling"]) == ("model_permission", True)
    assert [model["parent"] for model in answer["data"]] == [None, None, "a"]


@pytest.mark.parametrize("name", ["nope", "org/nope"])
def test_an_unknown_model(client: TestClient, name: str) -> None:
    answer = client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("loading", 200, 503), ("ready", 200, 200), ("draining", 200, 503), ("dead", 503, 503)],
)
def test_probes(client: TestClient, runtime: FakeRuntime, state: str, health: int, ready: int) -> None:
    runtime.state, runtime.reason = state, "because of b"
    for path, status in (("/health", health), ("/ready", ready)):
        answer = client.get(path)
        assert answer.status_code == status
        if status == 503:
            assert "because of b" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"]


@pytest.mark.parametrize(("state", "up"), [("loading", 0), ("ready", 1), ("draining", 1), ("dead", 0)])
def test_members_are_up_once_the_engine_is_ready(
    client: TestClient, runtime: FakeRuntime, state: str, up: int
) -> None:
    runtime.state = state
    text = client.get("/metrics").text
    for member in (model.name for model in MODELS if model.kind == "member"):
        assert f'unisono_member_up{{member="{member}"}} {up}.0' in text
    assert 'member="duo"' not in text


def test_strategies_come_with_the_schemas_of_their_options(client: TestClient) -> None:
    found = client.get("/v1/strategies").json()
    assert found.keys() == {"fusions", "modes"}
    assert found["fusions"]["relative"]["properties"]["solver"]["enum"] == ["em", "search"]


def test_promtool_accepts_what_a_fresh_server_says(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=answer.content, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_openmetrics_on_request(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    assert answer.headers["vary"] == "Accept"


def test_requests_and_choices_are_counted_apart(client: TestClient) -> None:
    client.post("/v1/completions", json={"model": "duo", "prompt": ["a", "b"], "n": 2})
    client.post("/v1/completions/", json={"model": "nope", "prompt": "a"})
    client.get("/nope")
    text = client.get("/metrics").text
    assert 'unisono_accepted_requests_total{model="duo"} 1.0' in text
    assert 'unisono_http_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert 'unisono_http_requests_total{route="/v1/completions",status="404"} 1.0' in text
    assert 'unisono_http_requests_total{route="none",status="404"} 1.0' in text
    assert "process_cpu_seconds_total" in text


def test_version(client: TestClient) -> None:
    assert client.get("/version").json()["version"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/responses", 405),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/tokenize", 405),
        ("POST", "/tokenizer_info", 405),
        ("POST", "/v1/completion/", 404),
        ("POST", "/v1/completions//", 404),
        ("HEAD", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_routes_and_wrong_methods(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path, headers={"X-Request-Id": "mine"})
    assert answer.status_code == status
    assert answer.headers["x-request-id"] == "mine"
    if method == "HEAD":
        assert (answer.content, answer.headers["allow"]) == (b"", "POST")
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path.removesuffix("/") in error["message"]
    if status == 405:
        assert answer.headers["allow"] in error["message"]


PLACES = ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/duo", "/tokenizer_info", "/docs"]


@pytest.mark.parametrize("path", [*PLACES, "/openapi.json"])
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    whole, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length"):
        assert (name == "content-length" and path == "/metrics") or head.headers[name] == whole.headers[name]


@pytest.mark.parametrize("path", PLACES)
def test_a_slash_at_the_end_changes_nothing(client: TestClient, path: str) -> None:
    plain, slashed = client.get(path), client.get(f"{path}/", follow_redirects=False)
    assert slashed.status_code == plain.status_code == 200
    assert path == "/metrics" or slashed.content == plain.content


@pytest.mark.parametrize("path", ["/v1/completions/", "/llm/v1/completions/"])
def test_a_slash_at_the_end_loses_no_body(path: str) -> None:
    config = ServerConfig(root_path="/llm", api_keys=(SecretStr("k"),))
    app = create_app(FakeRuntime(), config, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url=HERE) as client:
        body = {"model": "duo", "prompt": "a b c"}
        answer = client.post(path, json=body, headers={"Authorization": "Bearer k"}, follow_redirects=False)
        assert answer.json()["usage"]["prompt_tokens"] == 3
        assert client.post(path, json=body).status_code == 401
        assert client.get("/llm/health/").status_code == client.head("/health/").status_code == 200


def test_every_answer_has_its_own_request_id(client: TestClient) -> None:
    ids = {client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


def test_the_documentation_describes_the_api(client: TestClient) -> None:
    assert client.get("/docs").status_code == 200
    api = client.get("/openapi.json").json()
    completions = api["paths"]["/v1/completions"]["post"]
    assert "422" not in completions["responses"]
    assert "text/event-stream" in completions["responses"]["200"]["content"]
    assert "text/event-stream" in api["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert "text/event-stream" in api["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
    assert {"/tokenize", "/detokenize", "/tokenizer_info"} <= set(api["paths"])
    schemas = api["components"]["schemas"]
    assert {"CompletionRequest", "ChatRequest", "EnsembleOptions", "StreamOptions", "ErrorBody"} <= set(schemas)
    assert {"members", "weights", "weighting", "fusion", "mode", "limits", "trace"} == set(
        schemas["EnsembleOptions"]["properties"]
    )
    assert "securitySchemes" not in api["components"]


def test_the_lifespan_starts_drains_and_stops() -> None:
    runtime = FakeRuntime()
    app = create_app(runtime, ServerConfig(drain_seconds=0.5), PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app):
        assert runtime.log == ["start"]
    assert runtime.log == ["start", "drain 0.5", "stop"]


def test_two_apps_share_nothing() -> None:
    first, second = (create_app(FakeRuntime(), ServerConfig(), PrometheusMetrics()) for _ in range(2))  # type: ignore[arg-type]
    with TestClient(first, base_url=HERE) as one, TestClient(second, base_url=HERE) as two:
        one.post("/v1/completions", json={})
        counted = 'unisono_requests_rejected_total{reason="invalid_request"} '
        assert f"{counted}1.0" in one.get("/metrics").text
        assert f"{counted}0.0" in two.get("/metrics").text

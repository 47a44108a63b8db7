"""Spans of requests: their names and attributes, their parents, and a real export over OTLP/HTTP."""

from __future__ import annotations

import gzip
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from captured_logs import captured
from fake_runtime import FakeRuntime, live_server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from ensemble_core.errors import ConfigError, NotReadyError
from ensemble_core.server_config import ServerConfig
from server.edge import app as edge_app
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.edge.traces import open_traces

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"model": "duo", "prompt": "a secret of mine"}
CHAT: dict[str, Any] = {"model": "duo", "messages": [{"role": "user", "content": "a secret of mine"}]}
TRACED = ServerConfig(traces=True, drain_seconds=0.2)
TRACE_ID, PARENT_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
TRACEPARENT = {"traceparent": f"00-{TRACE_ID:032x}-{PARENT_ID:016x}-01"}


NAMES = {
    value
    for module in (gen_ai_attributes, gen_ai_metrics, http_attributes, error_attributes)
    for value in vars(module).values()
    if isinstance(value, str)
}


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans are sent soon, and nothing else is configured."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Takes the spans of apps that are made after this."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(edge_app, "open_traces", lambda: open_traces(exporter))
    return exporter


@pytest.fixture
def client(runtime: FakeRuntime, exporter: InMemorySpanExporter) -> Iterator[TestClient]:
    app = create_app(runtime, TRACED, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, raise_server_exceptions=False, base_url="http://localhost") as client:
        yield client


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 5.0
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def only(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, Any]]:
    """The one span, and its attributes."""
    (span,) = wait_for(exporter.get_finished_spans)
    return span, dict(span.attributes or {})


def test_a_response_is_one_span(client: TestClient, exporter: InMemorySpanExporter) -> None:
    body = {"model": "duo", "input": "a b c", "max_output_tokens": 9}
    assert client.post("/v1/responses", json=body).status_code == 200
    span, told = only(exporter)
    assert (span.name, told["http.route"]) == ("chat duo", "/v1/responses")
    assert told["gen_ai.response.id"].startswith("resp_")
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.usage.output_tokens"]) == (9, 4)


@pytest.mark.parametrize(
    ("path", "fields", "operation"),
    [("/v1/completions", BASE, "text_completion"), ("/v1/chat/completions", CHAT, "chat")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span(
    client: TestClient,
    runtime: FakeRuntime,
    exporter: InMemorySpanExporter,
    path: str,
    fields: dict[str, Any],
    operation: str,
    stream: bool,
) -> None:
    runtime.delay = 0.02
    chosen = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 9, "seed": 3, "n": 2, "stream": stream}
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    before = time.time_ns()
    answer = client.post(path, json=fields | chosen | usage, headers={"X-Request-Id": "mine"})
    assert answer.status_code == 200
    span, told = only(exporter)
    assert (span.name, span.kind, span.status.status_code) == (
        f"{operation} duo",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.parent is None
    assert before <= span.start_time < span.end_time <= time.time_ns()  # type: ignore[operator]
    assert span.end_time - span.start_time >= 8 * 0.02 * 1e9  # type: ignore[operator]
    first = told.pop("gen_ai.server.time_to_first_token")
    chunk = told.pop("gen_ai.response.time_to_first_chunk", None)
    assert 0.02 <= first < 8 * 0.02
    assert (chunk is not None) == stream
    assert told.pop("gen_ai.response.id").startswith("cmpl-" if operation == "text_completion" else "chatcmpl-")
    prompt_tokens = told.pop("gen_ai.usage.input_tokens")
    assert prompt_tokens == (4 if operation == "text_completion" else 5)
    assert told == {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "unisono.request_id": "mine",
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "unisono",
        "gen_ai.request.model": "duo",
        "gen_ai.response.model": "duo",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": stream,
        "gen_ai.response.finish_reasons": ("stop", "stop"),
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 8,
    }


def test_names_are_those_of_the_conventions_and_nothing_is_quoted(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    client.post(
        "/v1/completions", json=BASE | {"stream": True, "seed": 1, "top_k": 1, "stop": "mine", "user": "me"}
    )
    span, told = only(exporter)
    ours = {name for name in told if name.startswith("unisono.")}
    assert ours == {"unisono.request_id"}
    assert told.keys() - ours <= NAMES
    assert not span.events
    for word in ("secret", "mine", "Hello"):
        assert word not in span.to_json()


def test_the_parent_is_the_callers(client: TestClient, exporter: InMemorySpanExporter) -> None:
    client.post("/v1/completions", json=BASE, headers=TRACEPARENT)
    span, _told = only(exporter)
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (TRACE_ID, PARENT_ID)
    assert span.parent.is_remote


@pytest.mark.parametrize("sent", ["", "garbage", f"00-{0:032x}-{0:016x}-01", "00-" + "é" * 6_000])
def test_a_wrong_traceparent_is_ignored(client: TestClient, exporter: InMemorySpanExporter, sent: str) -> None:
    assert client.post("/v1/completions", json=BASE, headers={"traceparent": sent.encode()}).status_code == 200
    span, _told = only(exporter)
    assert span.parent is None


def test_a_caller_that_does_not_sample_gets_no_span(client: TestClient, exporter: InMemorySpanExporter) -> None:
    client.post("/v1/completions", json=BASE, headers={"traceparent": TRACEPARENT["traceparent"][:-2] + "00"})
    client.get("/version")
    span, _told = only(exporter)
    assert span.name == "GET /version"


@pytest.mark.parametrize(
    ("fields", "status"), [({"n": 0}, 400), ({"model": "nope"}, 404), ({"ensemble": {"mine": 1}}, 400)]
)
def test_a_refusal_is_no_error_of_the_server(
    client: TestClient, exporter: InMemorySpanExporter, fields: dict[str, Any], status: int
) -> None:
    client.post("/v1/completions", json=BASE | fields)
    span, told = only(exporter)
    assert (span.name, span.status.status_code) == ("text_completion", StatusCode.UNSET)
    assert told["http.response.status_code"] == status
    assert {"gen_ai.request.model", "error.type"}.isdisjoint(told)
    assert "nope" not in span.to_json()


@pytest.mark.parametrize(
    ("refuse", "status", "error"), [(RuntimeError("x"), 500, "500"), (NotReadyError("x"), 503, "503")]
)
def test_a_failure_is_an_error(
    client: TestClient,
    runtime: FakeRuntime,
    exporter: InMemorySpanExporter,
    refuse: Exception,
    status: int,
    error: str,
) -> None:
    runtime.refuse = refuse
    client.post("/v1/completions", json=BASE)
    span, told = only(exporter)
    assert span.status.status_code == StatusCode.ERROR
    assert told["http.response.status_code"] == status
    assert told["error.type"] == ("RuntimeError" if status == 500 else error)


def test_a_stream_that_fails_is_an_error_too(
    client: TestClient, runtime: FakeRuntime, exporter: InMemorySpanExporter
) -> None:
    runtime.breaks = NotReadyError("stopping")
    client.post("/v1/completions", json=BASE | {"stream": True})
    span, told = only(exporter)
    assert span.status.status_code == StatusCode.ERROR
    assert (told["http.response.status_code"], told["error.type"]) == (200, "NotReadyError")
    assert told["gen_ai.usage.output_tokens"] == 3


def test_probes_make_no_spans_and_unknown_paths_are_not_quoted(
    client: TestClient, exporter: InMemorySpanExporter
) -> None:
    for path in ("/health", "/ready", "/metrics", "/mine"):
        client.get(path)
    span, told = only(exporter)
    assert span.name == "GET"
    assert told["http.response.status_code"] == 404
    assert "mine" not in span.to_json()


def test_a_client_that_leaves_is_no_error_of_the_server(
    runtime: FakeRuntime, exporter: InMemorySpanExporter
) -> None:
    runtime.endless, runtime.delay = True, 0.01
    with live_server(runtime, TRACED) as base:
        with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
            next(answer.iter_bytes())
        span, told = only(exporter)
    assert span.status.status_code == StatusCode.UNSET
    assert told["error.type"] == "client_disconnected"
    assert told["gen_ai.usage.output_tokens"] >= 1


class Receiver(ThreadingHTTPServer):
    """A collector: keeps what is posted to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taker)
        self.taken: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Taker(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Receiver)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.taken.append((self.path, headers, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


def test_spans_arrive_over_otlp_as_the_variables_say(
    runtime: FakeRuntime, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=one")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # so that the server's end has to send them
    with live_server(runtime, TRACED) as base:
        assert httpx.post(f"{base}/v1/completions", json=BASE, headers=TRACEPARENT).status_code == 200
        assert receiver.taken == []
    ((path, headers, taken),) = receiver.taken
    assert (path, headers["x-tenant"], headers["content-encoding"]) == ("/v1/traces", "one", "gzip")
    (group,) = taken.resource_spans
    resource = {each.key: each.value.string_value for each in group.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("unisono", "test")
    (span,) = group.scope_spans[0].spans
    assert (span.name, span.trace_id.hex()) == ("text_completion duo", f"{TRACE_ID:032x}")
    assert span.parent_span_id.hex() == f"{PARENT_ID:016x}"
    told = {each.key: each.value for each in span.attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 4
    assert told["gen_ai.request.temperature"].double_value == 1.0
    assert [each.string_value for each in told["gen_ai.response.finish_reasons"].array_value.values] == ["stop"]
    assert b"secret" not in taken.SerializeToString()


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("OTEL_SERVICE_NAME", "mine", "mine"),
        ("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine", "mine"),
        ("OTEL_SERVICE_NAME", "", "unisono"),
    ],
)
def test_the_service_has_a_name(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str) -> None:
    monkeypatch.setenv(variable, value)
    exporter = InMemorySpanExporter()
    traces = open_traces(exporter)
    traces._tracer.start_span("x").end()
    traces.close()
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == name


@pytest.mark.parametrize(
    ("variable", "value"), [("OTEL_TRACES_SAMPLER", "always_off"), ("OTEL_SDK_DISABLED", "true")]
)
def test_variables_can_turn_spans_off(
    runtime: FakeRuntime,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    app = create_app(runtime, TRACED, PrometheusMetrics())  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        client.get("/version")
    assert exporter.get_finished_spans() == ()


def test_a_collector_that_is_gone_costs_a_line_of_the_log(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with captured("info") as log:
        with live_server(runtime, TRACED) as base:
            for _ in range(3):
                assert httpx.post(f"{base}/v1/completions", json=BASE).status_code == 200
            wait_for(lambda: "opentelemetry" in log.getvalue())
            started = time.monotonic()
        assert time.monotonic() - started < 8.0
    assert all(line[:4].isdecimal() or line.startswith("    ") for line in log.getvalue().splitlines())


def test_a_collector_that_hangs_does_not_hold_up_the_servers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, captured("info") as log:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        traces = open_traces()
        traces._tracer.start_span("x").end()
        started = time.monotonic()
        traces.close(0.3)
        assert time.monotonic() - started < 2.0
    assert "the last spans are lost" in log.getvalue()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
    ],
)
def test_what_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=rf"server.traces: {variable} is '{value}'"):
        open_traces()


@pytest.mark.parametrize(
    "missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter"]
)
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"server\.traces: OpenTelemetry is not installed .*unisono\[otel\]"):
        create_app(runtime, TRACED, PrometheusMetrics())  # type: ignore[arg-type]
    create_app(runtime, ServerConfig(), PrometheusMetrics())  # type: ignore[arg-type]


def test_the_sdk_is_imported_only_where_it_is_asked_for() -> None:
    code = "import sys, server.edge.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_web_framework_sends_nothing_of_its_own(
    runtime: FakeRuntime, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI can export spans, and logs that quote wrong bodies."""
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.address)
    with live_server(runtime, ServerConfig(drain_seconds=0.2)) as base:
        assert httpx.post(f"{base}/v1/completions", json=BASE | {"max_tokens": "secret"}).status_code == 400
        assert httpx.post(f"{base}/v1/completions", json=BASE).status_code == 200
    assert receiver.taken == []

"""A whole server process: ready line, signals, drain, exit codes."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

TESTS = Path(__file__).parents[1]
BASE = {"model": "duo", "prompt": "a b c"}

# Stands in for the engine and leaves the rest of `unisono serve` as it is.
PROGRAM = """
import sys, types
sys.path.insert(0, {tests!r})
from fake_runtime import FakeRuntime
from ensemble_core.errors import CheckpointError, UnisonoError

class Runtime(FakeRuntime):
    def __init__(self, config, sink):
        super().__init__({options})

sys.modules["ensemble_core.runtime"] = types.SimpleNamespace(Runtime=Runtime)
from server.cli import main
sys.argv = ["unisono", "serve", "--config", {config!r}, "--port", "{port}", *{arguments!r}]
main()
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(
        "members: {a: {model: ./a}, b: {model: ./b}}\n"
        "ensembles: {duo: {members: {a: 1, b: 1}, main: a}}\n"
        "server: {drain_seconds: 1.0}\n"
    )
    return str(path)


@contextmanager
def serving(
    config: str, options: str = "", port: int = 0, arguments: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    program = PROGRAM.format(tests=str(TESTS), config=config, options=options, port=port, arguments=arguments)
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The first line of stderr that has the words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line.strip()
    raise AssertionError(f"the process ended without {words!r}")


def address(process: subprocess.Popen[str]) -> str:
    found = re.search(r"http://\S+:\d+", read_until(process, "ready at"))
    assert found is not None
    return found[0]


def test_the_printed_curl_line_is_a_request_that_works(config: str) -> None:
    with serving(config) as process:
        base = address(process)
        words = shlex.split(read_until(process, "curl"))
        assert words[1] == f"{base}/v1/completions"
        name, value = words[words.index("-H") + 1].split(": ")
        answer = httpx.post(words[1], content=words[words.index("-d") + 1], headers={name: value})
        assert answer.status_code == 200
        assert answer.json()["model"] == "duo"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_in_order(config: str, number: signal.Signals) -> None:
    with serving(config) as process:
        address(process)
        process.send_signal(number)
        assert process.wait(timeout=10) == 0


def test_a_running_stream_ends_in_order_while_new_requests_are_refused(config: str) -> None:
    with serving(config, "delay=0.15") as process:
        base = address(process)
        with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            next(lines)
            assert httpx.get(f"{base}/ready").status_code == 503
            refused = httpx.post(f"{base}/v1/completions", json=BASE)
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            rest = list(lines)
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
        assert rest[-1] == "data: [DONE]"
        assert process.wait(timeout=10) == 0


def test_a_stream_that_outlasts_the_drain_is_told(config: str) -> None:
    with serving(config, "endless=True, delay=0.05") as process:
        base = address(process)
        with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, failure, done = lines
        assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "not_ready"
        assert done == "data: [DONE]"
        assert process.wait(timeout=10) == 0


def test_loading_that_fails_is_one_line_and_a_failure(config: str) -> None:
    with serving(
        config, "state='dead', load_error=CheckpointError('member b: no files; run unisono pull')"
    ) as process:
        _out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        assert err.splitlines()[-1] == "unisono: member b: no files; run unisono pull"
        assert "Traceback" not in err


def test_with_keys_the_printed_line_asks_for_one_and_shows_none(config: str) -> None:
    with serving(config, arguments=("--api-key", "sk-secret")) as process:
        base = address(process)
        line = read_until(process, "curl")
        assert "Bearer $UNISONO_API_KEY" in line
        assert "sk-secret" not in line
        assert httpx.post(f"{base}/v1/completions", json=BASE).status_code == 401
        headers = {"Authorization": "Bearer sk-secret"}
        assert httpx.post(f"{base}/v1/completions", json=BASE, headers=headers).status_code == 200


def test_wrong_tls_files_are_one_line_and_a_failure(config: str) -> None:
    files = ("--tls-cert-file", "nowhere/cert.pem", "--tls-key-file", "nowhere/key.pem")
    with serving(config, arguments=files) as process:
        _out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        (line,) = err.splitlines()
        assert "nowhere/cert.pem cannot be read" in line


def test_an_address_in_use_is_one_line_and_a_failure(config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with serving(config, port=taken.getsockname()[1]) as process:
            _out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        (line,) = err.splitlines()
        assert "cannot listen on 127.0.0.1" in line
        assert "--port" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_drain(config: str, number: signal.Signals) -> None:
    path = Path(config)
    path.write_text(path.read_text().replace("drain_seconds: 1.0", "drain_seconds: 60.0"))
    with serving(config, "endless=True, delay=0.05") as process:
        base = address(process)
        with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            while httpx.get(f"{base}/ready").status_code != 503:
                time.sleep(0.01)
            process.send_signal(number)
            rest = [line for line in lines if line]
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert (error["code"], rest[-1]) == ("not_ready", "data: [DONE]")
        assert process.wait(timeout=5) == 0


def edit(config: str, **server: object) -> None:
    """Add fields to the server's section."""
    path = Path(config)
    fields = "".join(f"{name}: {value}, " for name, value in server.items())
    path.write_text(path.read_text().replace("server: {", "server: {" + fields))


def test_as_json_every_line_is_an_object(config: str) -> None:
    edit(config, log_format="json")
    with serving(config) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if "curl " in line:
                break
        base = re.search(r"http://[^/\s]+:\d+", lines[-1])
        assert base is not None
        httpx.post(f"{base[0]}/v1/completions", json=BASE, headers={"X-Request-Id": "mine"})
        process.send_signal(signal.SIGTERM)
        lines += process.stderr
        assert process.wait(timeout=10) == 0
    told = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "request_id", "message"} <= each.keys() for each in told)
    assert {"uvicorn.error", "server.cli", "server.edge.access"} <= {each["logger"] for each in told}
    (access,) = [each for each in told if each["logger"] == "server.edge.access"]
    assert (access["request_id"], access["route"], access["status"]) == ("mine", "/v1/completions", 200)


def test_traces_without_the_extra_are_one_line_and_a_failure(config: str) -> None:
    edit(config, traces="true")
    hidden = "sys.modules['opentelemetry.sdk.trace'] = None"
    with serving(config, f"**(exec({hidden!r}, globals()) or {{}})") as process:
        _out, err = process.communicate(timeout=20)
        assert process.returncode == 1
        (line,) = err.splitlines()
        assert line.startswith("unisono: server.traces: OpenTelemetry is not installed")
        assert "pip install 'unisono[otel]'" in line

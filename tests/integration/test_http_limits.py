"""What clients may use up: raw connections against a real server, with bodies and headers that no library sends."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_runtime import FakeRuntime, live_server

from ensemble_core.server_config import ServerConfig

BASE = {"model": "duo", "prompt": "a b c"}
JSON_TYPE = {"Content-Type": "application/json"}
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + JSON


@contextmanager
def server(runtime: FakeRuntime | None = None, max_body_bytes: int = 4 * 2**20, **limits: Any) -> Iterator[str]:
    config = ServerConfig.model_validate({"max_body_bytes": max_body_bytes, "limits": limits})
    with live_server(runtime or FakeRuntime(), config) as base:
        yield base


def connect(base: str) -> socket.socket:
    where = urlsplit(base)
    return socket.create_connection((where.hostname or "", where.port or 0), timeout=10)


def rest(sock: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def error_of(answer: bytes) -> dict[str, Any]:
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2])["error"])


def works(base: str) -> None:
    assert httpx.post(f"{base}/v1/completions", json=BASE, timeout=5).status_code == 200


@pytest.mark.parametrize("first", [b"", b"GET", b"POST / HTTP/1.1\r\nHost: localhost\r\nX"])
def test_a_connection_that_says_nothing_or_half_is_closed(first: bytes) -> None:
    with server(header_seconds=0.3) as base, closing(connect(base)) as sock:
        sock.sendall(first)
        started = time.monotonic()
        answer = rest(sock)
        assert 0.2 < time.monotonic() - started < 3
        assert answer.startswith(b"HTTP/1.1 408")
        assert "header_seconds" in error_of(answer)["message"]
        works(base)


def test_dripped_headers_do_not_move_the_deadline() -> None:
    with server(header_seconds=0.5) as base, closing(connect(base)) as sock:
        started = time.monotonic()
        try:
            for sign in b"GET /health HTTP/1.1\r\nX: " + b"a" * 100:
                sock.sendall(bytes([sign]))
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - started < 3


def test_the_clock_of_a_second_request_starts_with_its_first_byte() -> None:
    with server(header_seconds=0.4) as base, closing(connect(base)) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.8)  # an idle connection may stay
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /version HTTP/1.1\r\n")
        assert rest(sock).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("dripped", [False, True])
def test_a_body_that_does_not_end_is_refused(dripped: bool) -> None:
    runtime = FakeRuntime()
    with server(runtime, body_seconds=0.4) as base, closing(connect(base)) as sock:
        sock.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        started = time.monotonic()
        for _ in range(20 if dripped else 0):
            try:
                sock.sendall(b" ")
            except OSError:
                break
            time.sleep(0.05)
        answer = rest(sock)
        assert time.monotonic() - started < 4
        assert answer.startswith(b"HTTP/1.1 408")
        assert error_of(answer)["code"] == "body_too_slow"
        assert not runtime.seen
        works(base)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_answered_and_not_read(chunked: bool) -> None:
    """The client can read the 413, and does not get rid of 300 MB."""
    size = 300 * 10**6
    with server(max_body_bytes=100_000) as base, closing(connect(base)) as sock:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
        sock.sendall(POST + length + b"\r\n\r\n")
        part = b"a" * 65536
        sock.settimeout(5)
        sent = 0
        started = time.monotonic()
        try:
            while sent < size:
                sock.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
                sent += len(part)
                time.sleep(0.01)
        except OSError:
            pass
        assert sent < size / 2
        assert time.monotonic() - started < 10
        works(base)


def test_a_413_reaches_a_client_that_is_still_sending() -> None:
    with server(max_body_bytes=100_000) as base:
        answer = httpx.post(
            f"{base}/v1/completions", content=b"a" * 5_000_000, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413


def test_bodies_together_are_bounded() -> None:
    with server(body_memory=300_000) as base:
        held = [connect(base) for _ in range(6)]
        for sock in held:
            sock.sendall(POST + b"Content-Length: 100001\r\n\r\n" + b" " * 100_000)
        answers = []
        for sock in held:
            sock.settimeout(0.5)
            try:
                answers.append(sock.recv(65536))
            except TimeoutError:
                answers.append(b"")
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
        assert refused
        assert b"retry-after" in refused[0].lower()
        works(base)
        for sock in held:
            sock.close()
        time.sleep(0.2)
        httpx.post(f"{base}/v1/completions", json=BASE | {"user": "x" * 200_000}).raise_for_status()


def test_connections_are_bounded_and_the_oldest_silent_one_makes_way() -> None:
    with server(connections=20, header_seconds=30) as base:
        silent = [connect(base) for _ in range(60)]
        works(base)
        silent[0].settimeout(2)
        assert rest(silent[0]) == b""
        for sock in silent:
            sock.close()


def test_a_request_whose_sending_side_is_closed_gets_its_answer() -> None:
    with server() as base, closing(connect(base)) as sock:
        body = json.dumps(BASE).encode()
        sock.sendall(POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        sock.shutdown(socket.SHUT_WR)
        assert rest(sock).startswith(b"HTTP/1.1 200")


def test_a_client_that_is_gone_still_aborts_its_request() -> None:
    runtime = FakeRuntime(delay=0.2, endless=True)
    with server(runtime) as base:
        sock = connect(base)
        body = json.dumps(BASE).encode()
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.2)
        sock.close()
        deadline = time.monotonic() + 5
        while not runtime.aborted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert runtime.aborted


def test_two_kinds_of_framing_are_refused() -> None:
    with server() as base, closing(connect(base)) as sock:
        sock.sendall(
            POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /version HTTP/1.1\r\n\r\n"
        )
        answer = rest(sock)
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"contradict" in answer


def test_what_is_not_http_gets_openais_shape() -> None:
    with server() as base, closing(connect(base)) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        answer = rest(sock)
        assert answer.startswith(b"HTTP/1.1 400")
        assert error_of(answer)["type"] == "invalid_request_error"


def test_long_headers_are_refused() -> None:
    with server(header_bytes=2000) as base:
        answer = httpx.get(f"{base}/version", headers={"X-Long": "a" * 3000})
        assert answer.status_code == 431
        works(base)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example"])
def test_without_keys_a_foreign_host_is_refused_on_loopback(host: str) -> None:
    with server() as base:
        assert httpx.get(f"{base}/v1/models", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "10.0.0.7"])
def test_local_names_and_addresses_are_served(host: str) -> None:
    with server() as base:
        assert httpx.get(f"{base}/v1/models", headers={"Host": host}).status_code == 200


def test_hosts_may_be_named() -> None:
    for hosts, status in ((("llm.example",), 200), (("*",), 200), (("other.example",), 421)):
        with live_server(FakeRuntime(), ServerConfig(allowed_hosts=hosts)) as base:
            answer = httpx.get(f"{base}/v1/models", headers={"Host": "llm.example:80"})
            assert answer.status_code == status


def test_a_reader_that_stalls_is_cut_off() -> None:
    runtime = FakeRuntime(script=["x" * 20_000], endless=True)
    with server(runtime, write_seconds=0.5) as base:
        sock = connect(base)
        body = json.dumps(BASE | {"stream": True}).encode()
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 8
        while not runtime.aborted and time.monotonic() < deadline:
            assert httpx.get(f"{base}/version", timeout=2).status_code == 200
            time.sleep(0.1)
        assert runtime.aborted
        sock.close()


WIDE = {
    "lists": b'{"model": "duo", "prompt": [' + b"[]," * 400_000 + b"[]]}",
    "ids": b'{"model": "duo", "prompt": [' + b"1," * 1_000_000 + b"1]}",
    "messages": b'{"model": "duo", "messages": [' + b"{}," * 500_000 + b"{}]}",
    "fields": b"{" + b",".join(b'"f%d":1' % i for i in range(10_000)) + b"}",
    "few messages": b'{"model": "duo", "messages": [' + b"{}," * 5_000 + b"{}]}",
    "parts": b'{"model": "duo", "messages": [{"role": "user", "content": [' + b"1," * 5_000 + b"1]}]}",
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_bodies_are_refused_before_they_are_looked_at(name: str) -> None:
    with server() as base:
        started = time.monotonic()
        path = "chat/completions" if "messages" in name or name == "parts" else "completions"
        answer = httpx.post(f"{base}/v1/{path}", content=WIDE[name], headers=JSON_TYPE)
        assert answer.status_code == 400
        assert time.monotonic() - started < 2
        assert len(answer.content) < 2000


def test_only_the_first_wrong_message_is_worded() -> None:
    with server() as base:
        answer = httpx.post(f"{base}/v1/chat/completions", json={"model": "duo", "messages": [{"role": 1}] * 1000})
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert error["param"].startswith("messages.0")
        assert "messages.1" not in error["message"]


def test_a_large_body_of_words_is_welcome() -> None:
    runtime = FakeRuntime()
    with server(runtime) as base:
        words = "Well, so it is: one, two [three]. " * 3000
        answer = httpx.post(f"{base}/tokenize", json={"model": "duo", "prompt": words})
        assert answer.status_code == 200


def test_answers_on_one_connection_come_at_once() -> None:
    """Without TCP_NODELAY a second answer waits 40 ms for the client's delayed ACK."""
    from server.edge.serving import listen

    with closing(listen(ServerConfig(port=0))) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

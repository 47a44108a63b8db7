"""A real server on a loopback port: disconnects, limits on the wire, many clients at once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_runtime import FakeRuntime, live_server

from ensemble_core.server_config import ServerConfig

BASE: dict[str, Any] = {"model": "duo", "prompt": "a b c"}
CHAT: dict[str, Any] = {"model": "duo", "messages": [{"role": "user", "content": "a b c"}]}
RESPONSE: dict[str, Any] = {"model": "duo", "input": "a b c"}
TEXT = " Hello wörld 😀!"


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def base(runtime: FakeRuntime) -> Iterator[str]:
    with live_server(runtime, ServerConfig(max_body_bytes=4096, drain_seconds=0.2)) as base:
        yield base


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_a_client_that_goes_aborts_its_requests(base: str, runtime: FakeRuntime, path: str, stream: bool) -> None:
    runtime.endless, runtime.delay = True, 0.005
    fields = {"/v1/completions": BASE | {"n": 2}, "/v1/chat/completions": CHAT | {"n": 2}}.get(path, RESPONSE)
    body = json.dumps(fields | {"stream": stream}).encode()
    host, _, port = base.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        wait_for(lambda: runtime.num_open == 1)
        assert runtime.aborted == []
    wait_for(lambda: runtime.num_open == 0)
    assert len(runtime.aborted) == fields.get("n", 1)


def test_a_client_that_goes_before_the_first_output_aborts_too(base: str, runtime: FakeRuntime) -> None:
    runtime.delay = 60.0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base}/v1/completions", json=BASE | {"stream": True}, timeout=0.3)
    wait_for(lambda: runtime.num_open == 0)
    assert len(runtime.aborted) == 1


def test_events_come_one_by_one(base: str, runtime: FakeRuntime) -> None:
    runtime.delay = 0.1
    arrivals = []
    with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                arrivals.append(time.monotonic())
    assert len(arrivals) == 5
    assert arrivals[3] - arrivals[0] > 0.2


def test_line_separators_survive_line_splitting_clients(base: str, runtime: FakeRuntime) -> None:
    runtime.script = ("a\u2028b", "\x85", "\u2029c\r\n")
    with httpx.stream("POST", f"{base}/v1/completions", json=BASE | {"stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == "".join(runtime.script)


@pytest.mark.parametrize("num_bytes", [5000, 3_000_000])
def test_large_bodies_get_their_413_on_the_wire(base: str, num_bytes: int) -> None:
    large = json.dumps(BASE | {"prompt": "x" * num_bytes}).encode()

    def pieces() -> Iterator[bytes]:
        yield large

    for content in (large, pieces()):
        answer = httpx.post(f"{base}/v1/completions", content=content)
        assert answer.status_code == 413
    assert httpx.post(f"{base}/v1/completions", json=BASE).status_code == 200


def test_many_async_clients_at_once(base: str, runtime: FakeRuntime) -> None:
    runtime.delay = 0.005

    async def one(client: openai.AsyncOpenAI, stream: bool) -> str:
        if not stream:
            return (await client.completions.create(model="duo", prompt="p")).choices[0].text
        chunks = await client.completions.create(model="duo", prompt="p", stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, bool(rank % 2)) for rank in range(16)))

    assert asyncio.run(run()) == [TEXT] * 16
    assert runtime.num_open == 0
    assert runtime.aborted == []

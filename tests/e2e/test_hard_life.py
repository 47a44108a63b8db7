"""A server process with few places, under what it must survive: too much load, silence, kills; with the real pair."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import free_port, wait_until_ready

from ensemble_core.config import Config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PLACES, QUEUE = 4, 4


class Server:
    """A process and its address."""

    def __init__(self, config: Path, log: Path) -> None:
        port = free_port()
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        command = [
            str(Path(sys.executable).parent / "unisono"),
            "serve",
            "--config",
            str(config),
            "--port",
            str(port),
        ]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def gauge(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"unisono_{name}"))

    def wait_idle(self) -> None:
        """Nothing runs, waits or holds pages."""
        deadline = time.monotonic() + 30
        names = ("num_requests_running", "num_requests_waiting", "member_kv_usage_ratio")
        while any(self.gauge(name) for name in names):
            assert time.monotonic() < deadline, {name: self.gauge(name) for name in names}
            time.sleep(0.2)


@pytest.fixture(scope="module")
def config(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair with few places."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    for member in raw["members"].values():
        member["kv_memory"] = "200MiB"
    raw["matrices"]["folder"] = str(demo_config.matrices.folder)
    raw["scheduler"] |= {"max_running": PLACES, "max_waiting": QUEUE}
    raw["server"]["drain_seconds"] = 2
    path = tmp_path_factory.mktemp("hard") / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def server(config: Path, tmp_path: Path) -> Iterator[Server]:
    made = Server(config, tmp_path / "log")
    try:
        wait_until_ready(made.process, made.url, made.log)
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def body(num_tokens: int = 40, **fields: Any) -> dict[str, Any]:
    base = {"model": "duet", "prompt": "The history of the lighthouse", "max_tokens": num_tokens}
    return base | {"ignore_eos": True, "stream": True} | fields


async def stream(http: httpx.AsyncClient, url: str, **fields: Any) -> tuple[int, float, list[str]]:
    """Status, seconds to the status, and the events."""
    begun = time.monotonic()
    async with http.stream("POST", f"{url}/v1/completions", json=body(**fields)) as answer:
        seconds = time.monotonic() - begun
        return answer.status_code, seconds, [line async for line in answer.aiter_lines() if line]


def test_four_times_the_load_gets_429_at_once_and_the_rest_is_served(server: Server) -> None:
    async def storm() -> list[tuple[int, float, list[str]]]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=120, limits=limits) as http:
            return await asyncio.gather(*(stream(http, server.url, seed=i) for i in range(4 * (PLACES + QUEUE))))

    answers = asyncio.run(storm())
    served = [lines for status, _, lines in answers if status == 200]
    refused = [(seconds, lines) for status, seconds, lines in answers if status == 429]
    assert len(served) + len(refused) == len(answers)
    assert len(served) >= PLACES + QUEUE
    assert len(refused) >= 2 * (PLACES + QUEUE)
    for lines in served:
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    server.wait_idle()


def test_a_thousand_silent_connections_keep_nobody_out(server: Server) -> None:
    where = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    silent = [socket.create_connection(where, timeout=5) for _ in range(1000)]
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=body(8, stream=False), timeout=30)
        assert answer.status_code == 200
        assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    finally:
        for sock in silent:
            sock.close()
    server.wait_idle()


def test_sigterm_under_load_ends_every_stream_and_exits_with_0(server: Server) -> None:
    async def under_load() -> list[tuple[int, float, list[str]]]:
        async with httpx.AsyncClient(timeout=120) as http:
            work = [
                asyncio.create_task(stream(http, server.url, num_tokens=n)) for n in (10, *[1500] * (PLACES - 1))
            ]
            while await asyncio.to_thread(server.gauge, "num_requests_running") < PLACES:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert (await http.get(f"{server.url}/ready")).status_code == 503
            refused = await http.post(f"{server.url}/v1/completions", json=body(4))
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
            return await asyncio.gather(*work)

    answers = asyncio.run(under_load())
    assert [status for status, _, _ in answers] == [200] * PLACES
    ends = [lines[-2] for _, _, lines in answers]
    assert all(lines[-1] == "data: [DONE]" for _, _, lines in answers)
    assert '"finish_reason":"length"' in ends[0]
    assert all("not_ready" in end for end in ends[1:])
    assert server.process.wait(timeout=20) == 0
    assert "Traceback" not in server.log.read_text()


def test_after_a_kill_the_next_start_is_as_good_as_any(server: Server, config: Path, tmp_path: Path) -> None:
    async def killed() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            work = [asyncio.create_task(stream(http, server.url, num_tokens=1000)) for _ in range(3)]
            await asyncio.sleep(1.0)
            server.process.kill()
            ended = await asyncio.gather(*work, return_exceptions=True)
            assert all(isinstance(each, httpx.HTTPError) for each in ended)

    asyncio.run(killed())
    again = Server(config, tmp_path / "again")
    try:
        wait_until_ready(again.process, again.url, again.log)
        assert httpx.post(f"{again.url}/v1/completions", json=body(4, stream=False), timeout=30).status_code == 200
    finally:
        again.process.kill()
        again.process.wait()


def test_a_client_that_waits_in_the_queue_and_goes_leaves_nothing(server: Server) -> None:
    async def gone() -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            running = [asyncio.create_task(stream(http, server.url, num_tokens=60)) for _ in range(PLACES)]
            await asyncio.sleep(0.5)
            waiting = [asyncio.create_task(stream(http, server.url, num_tokens=500)) for _ in range(3)]
            await asyncio.sleep(0.5)
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert [status for status, _, _ in await asyncio.gather(*running)] == [200] * PLACES

    asyncio.run(gone())
    server.wait_idle()


def test_one_request_with_many_choices_does_not_keep_another_waiting(server: Server) -> None:
    """A one-token request beside `n: 4` of 300 tokens, which take all places."""

    async def beside() -> tuple[float, float]:
        async with httpx.AsyncClient(timeout=120) as http:
            begun = time.monotonic()
            big = asyncio.create_task(stream(http, server.url, num_tokens=300, n=PLACES))
            await asyncio.sleep(1.0)
            asked = time.monotonic()
            status, _, _ = await stream(http, server.url, num_tokens=1)
            small = time.monotonic() - asked
            assert status == 200
            assert (await big)[0] == 200
            return small, time.monotonic() - begun

    small, big = asyncio.run(beside())
    assert small < big / 3
    server.wait_idle()

"""A server process and a small streaming client that sends by the clock.

Open loop: a request leaves when its schedule says, whether or not earlier ones are answered, and its latency counts
from that moment; so a slow server cannot slow down its own load. Knows HTTP alone; sends to this machine's loopback.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
from tqdm import tqdm

START_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Call:
    """One streamed completion: exactly `num_tokens` tokens after a prompt, `after` seconds from the start."""

    model: str
    prompt: str | list[int]
    num_tokens: int
    after: float = 0.0

    def body(self) -> dict[str, object]:
        """As /v1/completions wants it."""
        counts = {"include_usage": True, "continuous_usage_stats": True}
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.num_tokens,
            "min_tokens": self.num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": counts,
        }


@dataclass(slots=True)
class Stream:
    """What came of a call; all times are perf_counter seconds. due: when it was to leave."""

    due: float
    arrivals: list[float] = field(default_factory=list)  # of each chunk that told of a new token
    num_tokens: int = 0
    num_prompt_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.due

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens; those gaps alone that touch the time from `start` to `end`."""
        return [b - a for a, b in pairwise(self.arrivals) if b > start and a < end]


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process of `rate` a second, from 0 to `seconds`, in order."""
    draw = random.Random(seed)
    moments: list[float] = []
    now = draw.expovariate(rate)
    while now < seconds:
        moments.append(now)
        now += draw.expovariate(rate)
    return moments


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """The address of a server process, ready. Raises SystemExit with its log where it does not start."""
    with serving_process(config) as (url, _process):
        yield url


@contextmanager
def serving_process(config: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same, with the process."""
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--config", str(config)]
    with started(command, "/ready", START_SECONDS) as running:
        yield running


@contextmanager
def started(
    command: Sequence[str | Path], ready: str, seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that `command` with a --port starts: its address once `ready` answers 200, and its process.

    environment: None: this process's. Raises SystemExit with its log where it does not start within so many seconds.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            if not _becomes_ready(process, url + ready, seconds):
                log.seek(0)
                raise SystemExit(f"the server did not start:\n{log.read()[-3000:]}")
            yield url, process
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _becomes_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    return False


async def play(url: str, calls: Sequence[Call], title: str = "") -> list[Stream]:
    """Send every call at its moment; the streams in the order of the calls. Raises where one is not whole."""
    async with client(url) as session:
        started = time.perf_counter()
        with tqdm(total=len(calls), desc=title, unit="stream", disable=None, leave=False) as bar:
            return list(
                await asyncio.gather(*(send(session, call, started + call.after, bar.update) for call in calls))
            )


async def replay(url: str, lines: Sequence[Sequence[Call]], title: str = "") -> list[Stream]:
    """Closed loop: each line of calls is one client that sends its next call when the last has ended."""
    async with client(url) as session:
        with tqdm(total=sum(map(len, lines)), desc=title, unit="stream", disable=None, leave=False) as bar:

            async def one(line: Sequence[Call]) -> list[Stream]:
                return [await send(session, call, time.perf_counter(), bar.update) for call in line]

            return [stream for each in await asyncio.gather(*map(one, lines)) for stream in each]


def client(url: str) -> httpx.AsyncClient:
    """As many connections as there are streams; no timeout but the caller's patience."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits)


async def send(
    session: httpx.AsyncClient, call: Call, due: float, done: Callable[[], object] = lambda: None
) -> Stream:
    """One whole call. Raises RuntimeError for an error or a wrong number of tokens."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    stream = Stream(due)
    await follow(session, call, stream)
    if stream.num_tokens != call.num_tokens:
        raise RuntimeError(f"a stream gave {stream.num_tokens} tokens where {call.num_tokens} were asked for")
    done()
    return stream


async def follow(session: httpx.AsyncClient, call: Call, stream: Stream) -> None:
    """Fill `stream` as the answer comes; cancelled, it hangs up. Raises RuntimeError for an error."""
    async with session.stream("POST", "/v1/completions", json=call.body()) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the server answered {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            _read(stream, line)


def _read(stream: Stream, line: str) -> None:
    """Take in one line of a server-sent event stream; each chunk says how many tokens there are so far."""
    if not line.startswith("data: {"):
        return
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RuntimeError(f"the stream broke: {chunk['error']['message']}")
    usage = chunk["usage"]
    if usage["completion_tokens"] > stream.num_tokens:
        stream.arrivals.append(time.perf_counter())
    stream.num_tokens, stream.num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]

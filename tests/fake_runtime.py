"""A scripted runtime: what the HTTP edge sees of the engine, without an engine.

Each request answers with the pieces of `script` (or its own, by prompt), one word a token; the prompt counts
one token a word. It records what it was asked for, what was aborted, and whether it was drained and stopped.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from ensemble_core.config import ServerConfig
from ensemble_core.decoding.requests import GenerationRequest, Output
from ensemble_core.errors import ModelNotFoundError, NotReadyError
from server.app import create_app
from server.metrics import PrometheusSink


@dataclass(frozen=True, slots=True)
class FakeStatus:
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class FakeModel:
    name: str
    kind: str
    max_model_len: int
    recipe: dict[str, Any] | None


RECIPE = {
    "members": {"a": 0.5, "b": 0.5},
    "main": "a",
    "fusion": {"name": "relative", "options": {}},
    "mode": "lockstep",
}
MODELS = [
    FakeModel("duo", "ensemble", 512, RECIPE),
    FakeModel("a", "member", 512, None),
    FakeModel("b", "member", 1024, None),
]


def outputs_of(pieces: Sequence[str], prompt: str, finish: str = "stop") -> list[Output]:
    """One output a piece; the last has the finish reason."""
    words = len(prompt.split())
    last = len(pieces) - 1
    return [
        Output(piece, (rank,), words, rank + 1, finish if rank == last else None)  # type: ignore[arg-type]
        for rank, piece in enumerate(pieces)
    ]


@dataclass
class FakeRuntime:
    script: Sequence[str] = (" Hello", " wörld", " 😀", "!")
    outputs: dict[str, list[Output]] = field(default_factory=dict)  # prompt -> its own outputs
    refuse: Exception | None = None  # raised by submit
    breaks: Exception | None = None  # raised in place of the last output
    endless: bool = False  # repeats the script until it is closed
    delay: float = 0.0  # seconds before each output
    state: str = "ready"
    reason: str = ""
    load_error: Exception | None = None
    seen: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    num_open: int = 0  # submitted and not over
    aborting: bool = False

    def start(self) -> None:
        self.log.append("start")

    def wait_ready(self) -> None:
        if self.load_error is not None:
            raise self.load_error

    def status(self) -> FakeStatus:
        return FakeStatus(self.state, self.reason)

    def models(self) -> list[FakeModel]:
        return MODELS

    async def submit(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        if self.refuse is not None:
            raise self.refuse
        if self.state != "ready":
            raise NotReadyError(f"the engine is {self.state}")
        for request in requests:
            if request.model not in {model.name for model in MODELS}:
                raise ModelNotFoundError(f"model {request.model!r} is unknown; there are duo, a, b")
        self.seen.extend(requests)
        return self._run(list(requests))

    async def _run(self, requests: list[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        open_ids = {request.request_id for request in requests}
        self.num_open += 1
        try:
            async for index, output in self._interleaved(requests):
                if self.aborting:
                    yield index, Output("", (), 1, 0, "abort")
                    return
                if output.finish_reason is not None:
                    open_ids.discard(requests[index].request_id)
                yield index, output
        finally:
            self.num_open -= 1
            self.aborted.extend(sorted(open_ids))

    async def _interleaved(self, requests: list[GenerationRequest]) -> AsyncGenerator[tuple[int, Output], None]:
        """Step by step over all requests, as an engine does."""
        scripts = [self._outputs(request) for request in requests]
        step = 0
        while self.endless or step < max(map(len, scripts)):
            for index, script in enumerate(scripts):
                if not self.endless and step >= len(script):
                    continue
                await asyncio.sleep(self.delay)
                if self.breaks is not None and step == len(script) - 1:
                    raise self.breaks
                yield index, self._output(script, step)
            step += 1

    def _output(self, script: list[Output], step: int) -> Output:
        if not self.endless:
            return script[step]
        return Output(script[step % len(script)].text, (step,), 1, step + 1)

    def _outputs(self, request: GenerationRequest) -> list[Output]:
        return self.outputs.get(request.prompt) or outputs_of(self.script, request.prompt)

    async def drain(self, seconds: float) -> None:
        self.state = "draining"
        self.log.append(f"drain {seconds:g}")
        deadline = time.monotonic() + seconds
        while self.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.aborting = True

    def stop(self) -> None:
        self.state = "dead"
        self.log.append("stop")


@contextmanager
def live_server(runtime: FakeRuntime, config: ServerConfig | None = None) -> Iterator[str]:
    """A real server on a free loopback port, in a thread; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(runtime, config or ServerConfig(), PrometheusSink())  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()

"""`unisono batch`: a file of requests, answered by the models of one configuration in this process.

The app is the server's own, without a socket, keys and access lines. The first SIGINT or SIGTERM begins no more
requests and lets those that run end within `server.drain_seconds`; a second one drops them. Either way the output
holds whole lines, and the message says how to go on.
"""

from __future__ import annotations

import asyncio
import shlex
import signal
import time
from collections.abc import Callable, Generator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

from ensemble_core.config import Config, SchedulerConfig
from ensemble_core.errors import ConfigError
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from server.batches.calls import InnerClient, batch_urls
from server.batches.flow import FlightWindow, Flow, FlowCounts
from server.batches.lines import CustomIds, Intake, raw_lines, taken_lines
from server.batches.results import LineResult, ResultFile, kept_answers
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics

if TYPE_CHECKING:
    from fastapi import FastAPI

_POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class BatchFiles:
    """The files of one run. errors: where lines that failed go, if not to the output."""

    requests: Path
    output: Path
    errors: Path | None
    resume: bool

    def check(self) -> None:
        """Raise ConfigError for files that cannot be meant, before models are loaded."""
        if not self.requests.is_file():
            raise ConfigError(f"--input {self.requests}: there is no such file")
        paths = [path.resolve() for path in (self.requests, self.output, self.errors) if path is not None]
        if len(set(paths)) < len(paths):
            raise ConfigError("--input, --output and --errors must be different files")
        for option, path in (("--output", self.output), ("--errors", self.errors)):
            if path is None:
                continue
            if path.exists() and not self.resume:
                raise ConfigError(f"{option} {path}: exists; pass --resume to go on, or another file")
            if not path.resolve().parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no folder {path.parent}")

    def answered(self) -> CustomIds:
        """The ids that the output answers; whatever failed before is dropped from both files, to be done again."""
        if self.errors is not None and self.errors.exists():
            kept_answers(self.errors)
        return kept_answers(self.output) if self.output.exists() else CustomIds()


@dataclass(slots=True)
class Ending:
    """How a run ended."""

    num_lines: int
    num_before: int  # answered by an earlier run; until the last line is read, all answers in the output
    counts: FlowCounts = field(default_factory=FlowCounts)
    seconds: float = 0.0  # from the first request to the last result
    signal: int | None = None
    failure: str | None = None

    @property
    def exit_code(self) -> int:
        """0: every line is answered. 1: some failed, or the run did. 128 and a signal's number: it was ended."""
        if self.signal is not None:
            return 128 + self.signal
        return int(self.counts.failed > 0 or self.failure is not None)

    @property
    def num_left(self) -> int:
        """Lines without a result."""
        return self.num_lines - self.num_before - self.counts.completed - self.counts.failed

    def summary(self) -> str:
        """One line."""
        counts, seconds = self.counts, max(self.seconds, 1e-9)
        before = f" ({self.num_before} of them before)" if self.num_before else ""
        left = f", {self.num_left} left" if self.num_left else ""
        return (
            f"batch: {self.num_lines} lines, {self.num_before + counts.completed} completed{before}, "
            f"{counts.failed} failed{left}; {counts.prompt_tokens} prompt and {counts.completion_tokens} completion "
            f"tokens in {self.seconds:.1f} s, {counts.completion_tokens / seconds:.1f} tokens/s"
        )


def run_batch(config: Config, source: Path, files: BatchFiles, say: Callable[[str], None]) -> int:
    """Answer the file and return the exit code. source: of the configuration, for the message on how to go on.

    say: shows a line to the user. Raises ConfigError for the files, and any error of loading.
    """
    files.check()
    answered = files.answered()
    num_lines = sum(1 for _ in raw_lines(files.requests, config.server.max_body_bytes))
    ending = Ending(num_lines, len(answered))
    asyncio.run(_BatchRun(config, files, answered, ending, say).run())
    say(ending.summary())
    if ending.failure is not None:
        say(f"batch: ended early: {ending.failure}")
    if ending.num_left or ending.counts.failed:
        say(f"batch: to do what is left or failed: {_again(source, files)}")
    return ending.exit_code


def _again(source: Path, files: BatchFiles) -> str:
    words = ["unisono", "batch", "--config", source, "--input", files.requests, "--output", files.output]
    words += [] if files.errors is None else ["--errors", files.errors]
    return shlex.join([*map(str, words), "--resume"])


def most_in_flight(scheduler: SchedulerConfig) -> int:
    """Requests that keep the engine full: one waits for each that runs, as far as the queue has room."""
    return scheduler.max_running + min(scheduler.max_running, scheduler.max_waiting)


def without_a_socket(server: ServerConfig) -> ServerConfig:
    """The server's section for an app that only this process calls."""
    no_keys = {"api_keys": (), "api_key_env": None, "api_key_file": None}
    no_keys |= {"admin_keys": (), "admin_key_env": None}
    return server.replaced(**no_keys, cors_origins=(), root_path="", files_folder=None, access_log=False)


@dataclass(slots=True)
class _BatchRun:
    config: Config
    files: BatchFiles
    answered: CustomIds
    ending: Ending
    say: Callable[[str], None]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    flow: Flow | None = None

    async def run(self) -> None:
        metrics = PrometheusMetrics()
        config = self.config.model_copy(update={"server": without_a_socket(self.config.server)})
        runtime = Runtime(config, metrics.record)
        app = create_app(runtime, config.server, metrics)
        with _handled(self._signal):
            async with app.router.lifespan_context(app):
                if await self._is_loaded(runtime):
                    await self._answer(app, runtime)

    async def _is_loaded(self, runtime: Runtime) -> bool:
        """Wait for the models. False: a signal came before. Raises any error of loading."""
        while runtime.status().state == "loading" and not self.stopping.is_set():
            await asyncio.sleep(_POLL_SECONDS)
        if not self.stopping.is_set():
            runtime.wait_ready()
        return not self.stopping.is_set()

    async def _answer(self, app: FastAPI, runtime: Runtime) -> None:
        server = self.config.server
        intake = Intake(batch_urls(app), server.max_body_bytes, server.limits.body_values, self.answered)
        lines = taken_lines(self.files.requests, server.max_body_bytes, intake)
        with closing(ResultFile(self.files.output, self.files.errors)) as file, self._bar() as bar:
            async with aclosing(lines), InnerClient(app, "") as client:
                deliver = partial(self._deliver, file, bar)
                window = FlightWindow(most_in_flight(self.config.scheduler))
                self.flow = Flow(client, partial(_gone, runtime), deliver, window, self.ending.counts)
                started = time.perf_counter()
                guard = asyncio.create_task(self._drop_in_time(server.drain_seconds))
                try:
                    if await self.flow.run(lines):
                        self.ending.num_before = intake.num_answered
                finally:
                    guard.cancel()
                    self.ending.seconds = time.perf_counter() - started
                    self.ending.failure = self.flow.failure

    def _bar(self) -> tqdm[NoReturn]:
        return tqdm(total=self.ending.num_lines, initial=self.ending.num_before, unit=" lines", disable=None)

    def _deliver(self, file: ResultFile, bar: tqdm[NoReturn], result: LineResult) -> None:
        file.write(result)
        bar.update()

    async def _drop_in_time(self, seconds: float) -> None:
        """After the first signal, end what still runs when the time is over."""
        await self.stopping.wait()
        await asyncio.sleep(seconds)
        if self.flow is not None:
            self.flow.drop()

    def _signal(self, number: int) -> None:
        if self.flow is None:
            self.say("batch: stopping before the models are loaded")
        elif not self.stopping.is_set():
            seconds = self.config.server.drain_seconds
            self.say(f"batch: {self.flow.num_running} requests may end within {seconds:g} s; once more drops them")
            self.flow.stop()
        else:
            self.flow.drop()
        self.ending.signal = number
        self.stopping.set()


def _gone(runtime: Runtime) -> str | None:
    status = runtime.status()
    return None if status.state == "ready" else f"the engine is {status.state}: {status.reason}"


@contextmanager
def _handled(on_signal: Callable[[int], None]) -> Generator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

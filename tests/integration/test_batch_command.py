"""`unisono batch` in this process, over a scripted runtime and over an engine of fake members."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_runtime import FakeRuntime
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from typer.testing import CliRunner

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.errors import CheckpointError, QueueFullError
from ensemble_core.factory import Loaded
from ensemble_core.stats import Record
from server.batches import command
from server.batches.command import most_in_flight, without_a_socket
from server.cli import app

CONFIG = "members: {a: {model: ./a}, b: {model: ./b}}\nensembles: {duo: {members: {a: 1, b: 1}, main: a}}\n"
TEXT = " Hello wörld 😀!"


@dataclass
class Desk:
    """The files of a run, and the command."""

    folder: Path
    requests: list[dict[str, Any] | str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "out.jsonl"

    @property
    def errors(self) -> Path:
        return self.folder / "errors.jsonl"

    def ask(self, custom_id: str, url: str = "/v1/completions", **body: Any) -> None:
        body = {"model": "duo", "prompt": custom_id} | body if url == "/v1/completions" else body
        self.requests.append({"custom_id": custom_id, "method": "POST", "url": url, "body": body})

    def run(self, *options: str) -> Any:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in self.requests]
        (self.folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))
        (self.folder / "config.yaml").write_text(CONFIG)
        files = ["--input", str(self.folder / "in.jsonl"), "--output", str(self.output)]
        return CliRunner().invoke(app, ["batch", "--config", str(self.folder / "config.yaml"), *files, *options])

    def lines(self, path: Path | None = None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (path or self.output).read_text().splitlines()]

    def statuses(self) -> dict[str | None, int | str]:
        return {
            line["custom_id"]: line["response"]["status_code"] if line["response"] else line["error"]["code"]
            for line in self.lines()
        }


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    made = FakeRuntime()

    def start(_config: Config, _record: Record) -> FakeRuntime:
        made.state, made.aborting = "ready", False
        return made

    monkeypatch.setattr(command, "Runtime", start)
    return made


def test_every_endpoint_that_takes_json_answers_in_a_batch(desk: Desk, runtime: FakeRuntime) -> None:
    desk.ask("completion")
    desk.ask("chat", "/v1/chat/completions", model="duo", messages=[{"role": "user", "content": "p q"}])
    desk.ask("ids", "/tokenize", model="a", prompt="p q")
    desk.ask("text", "/detokenize", tokens=[7])
    result = desk.run()
    assert result.exit_code == 0, result.stderr
    bodies = {line["custom_id"]: line["response"]["body"] for line in desk.lines()}
    assert bodies["completion"]["choices"][0]["text"] == TEXT
    assert bodies["chat"]["choices"][0]["message"]["content"] == TEXT
    assert bodies["ids"]["count"] == 3
    assert bodies["text"] == {"prompt": " t7"}
    assert "4 lines, 4 completed, 0 failed; 4 prompt and 8 completion tokens" in result.stderr
    assert "tokens/s" in result.stderr
    assert runtime.log[-1] == "stop"


def test_each_wrong_line_has_its_error_and_the_others_go_on(desk: Desk, runtime: FakeRuntime) -> None:
    desk.ask("good")
    desk.ask("good")
    desk.ask("hot", temperature=9)
    desk.ask("unknown", model="nope")
    desk.ask("stream", stream=True)
    desk.ask("where", "/v1/admin/models")
    desk.requests.append("{half a line")
    desk.ask("last")
    result = desk.run()
    assert result.exit_code == 1
    assert "8 lines, 2 completed, 6 failed" in result.stderr
    assert "--resume" in result.stderr
    codes = [line["error"]["code"] for line in desk.lines() if line["error"]]
    assert codes == ["duplicate_custom_id", "stream_not_allowed", "invalid_url", "invalid_json"]
    found = {line["custom_id"]: line for line in desk.lines() if line["response"]}
    assert {name: line["response"]["status_code"] for name, line in found.items()} == {
        "good": 200,
        "hot": 400,
        "unknown": 404,
        "last": 200,
    }
    assert found["hot"]["response"]["body"]["error"]["param"] == "temperature"
    assert found["hot"]["response"]["request_id"]
    assert {request.prompt for request in runtime.seen} == {"good", "last"}


def test_a_resume_does_what_failed_and_what_is_new(desk: Desk, runtime: FakeRuntime) -> None:
    desk.ask("a")
    desk.ask("b", model="nope")
    assert desk.run("--errors", str(desk.errors)).exit_code == 1
    assert [line["custom_id"] for line in desk.lines(desk.errors)] == ["b"]
    (kept,) = desk.lines()
    desk.requests.pop()
    desk.ask("b")
    desk.ask("c")
    result = desk.run("--errors", str(desk.errors), "--resume")
    assert result.exit_code == 0, result.stderr
    assert "3 lines, 3 completed (1 of them before), 0 failed" in result.stderr
    assert desk.lines()[0] == kept
    assert desk.statuses() == {"a": 200, "b": 200, "c": 200}
    assert desk.lines(desk.errors) == []
    assert [request.prompt for request in runtime.seen] == ["a", "b", "c"]
    assert desk.run("--resume").exit_code == 0
    assert len(runtime.seen) == 3


def test_files_are_checked_before_models_are_loaded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Runtime", None)
    desk.ask("a")
    desk.output.write_text("")
    for options, problem in (
        ((), "exists; pass --resume"),
        (("--errors", str(desk.output), "--resume"), "must be different files"),
        (("--input", str(desk.folder / "nope")), "there is no such file"),
        (("--output", str(desk.folder / "no" / "out")), "there is no folder"),
        (("--output", str(desk.folder / "in.jsonl"), "--resume"), "must be different files"),
        (("--output", str(desk.folder / "config.yaml"), "--resume"), "not a batch's result"),
    ):
        result = desk.run(*options)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert problem in line
    assert desk.output.read_text() == ""
    assert (desk.folder / "config.yaml").read_text() == CONFIG


def test_a_failure_of_loading_leaves_no_output_behind(desk: Desk, runtime: FakeRuntime) -> None:
    runtime.load_error = CheckpointError("member 'a': its files are missing")
    desk.ask("a")
    result = desk.run()
    assert (result.exit_code, result.stderr) == (1, "unisono: member 'a': its files are missing\n")
    assert not desk.output.exists()


def test_a_full_queue_is_waited_for(desk: Desk, runtime: FakeRuntime) -> None:
    runtime.refuse_once = [QueueFullError("full") for _ in range(2)]
    for name in "abc":
        desk.ask(name)
    assert desk.run().exit_code == 0
    assert desk.statuses() == dict.fromkeys("abc", 200)


def test_no_more_requests_are_in_flight_than_the_engine_has_use_for(desk: Desk, runtime: FakeRuntime) -> None:
    most = 0
    submit = runtime.submit

    async def counted(requests: Any) -> Any:
        nonlocal most
        most = max(most, runtime.num_open)
        return await submit(requests)

    runtime.submit = counted  # type: ignore[method-assign]
    runtime.script, runtime.delay = ("x",), 2.0
    for rank in range(70):
        desk.ask(f"c{rank}")
    assert desk.run().exit_code == 0
    assert most == 63  # beside the one that is just coming


def on_request(runtime: FakeRuntime, number: int, do: Callable[[], None]) -> None:
    check = runtime._check

    def checked(request: GenerationRequest) -> None:
        if len(runtime.seen) == number:
            do()
        check(request)

    runtime._check = checked  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_whole_lines(desk: Desk, runtime: FakeRuntime, number: int) -> None:
    runtime.delay = 0.02
    for rank in range(400):
        desk.ask(f"c{rank}")
    on_request(runtime, 100, lambda: os.kill(os.getpid(), number))
    result = desk.run()
    assert result.exit_code == 128 + number
    done = len(desk.lines())
    assert 100 < done < 200
    assert f"{400 - done} left" in result.stderr
    assert set(desk.statuses().values()) == {200}
    assert runtime.aborted == []  # those that ran have ended
    again = desk.run("--resume")
    assert again.exit_code == 0
    assert f"({done} of them before)" in again.stderr
    assert desk.statuses() == {f"c{rank}": 200 for rank in range(400)}
    assert len(runtime.seen) == 400


def test_a_second_signal_drops_what_runs(desk: Desk, runtime: FakeRuntime) -> None:
    def twice() -> None:
        runtime.endless = True  # without the second one, the run would last for server.drain_seconds
        os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    runtime.delay = 0.01
    for rank in range(100):
        desk.ask(f"c{rank}")
    on_request(runtime, 70, twice)
    started = time.monotonic()
    result = desk.run()
    assert time.monotonic() - started < 10
    assert result.exit_code == 130
    assert set(desk.statuses().values()) <= {200}
    assert len(desk.lines()) < 80
    assert len(runtime.aborted) > 10


def test_a_dead_engine_ends_the_run(desk: Desk, runtime: FakeRuntime) -> None:
    for rank in range(300):
        desk.ask(f"c{rank}")

    def die() -> None:
        runtime.state, runtime.reason = "dead", "out of memory"

    on_request(runtime, 100, die)
    result = desk.run()
    assert result.exit_code == 1
    assert "ended early: the engine is dead: out of memory" in result.stderr
    assert set(desk.statuses().values()) == {200}
    assert len(desk.lines()) < 200


def test_keys_and_hosts_of_the_server_do_not_matter() -> None:
    config = fake_config(server={"api_key_env": "MISSING", "host": "0.0.0.0", "allowed_hosts": ["llm.example"]})
    inner = without_a_socket(config.server)
    assert (inner.api_key_env, inner.access_log) == (None, False)


@pytest.mark.parametrize(
    ("limits", "most"), [({}, 64), ({"max_running": 4}, 8), ({"max_running": 8, "max_waiting": 1}, 9)]
)
def test_in_flight(limits: dict[str, int], most: int) -> None:
    assert most_in_flight(fake_config(scheduler=limits).scheduler) == most


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeMember]:
    """Of the engine of every run, whose scheduler has few places."""
    found: dict[str, FakeMember] = {}

    def load(config: Config, record: Record) -> Loaded:
        found["alpha"] = FakeMember("alpha", byte_vocabulary(), seed=1)
        found["beta"] = FakeMember("beta", pair_vocabulary(), seed=2)
        return fake_loaded(config, found, record)

    few = fake_config(scheduler={"max_running": 3, "max_waiting": 4})
    monkeypatch.setattr(factory, "load", load)
    monkeypatch.setattr("server.terminal.load_config", lambda _path: few)
    return found


def test_an_engine_with_few_places_answers_all_and_refuses_none(
    desk: Desk, members: dict[str, FakeMember]
) -> None:
    for rank in range(12):
        desk.ask(f"c{rank}", max_tokens=4, temperature=0, n=1 + rank % 4, best_of=4)
    result = desk.run()
    assert result.exit_code == 0, result.stderr
    assert desk.statuses() == {f"c{rank}": 200 for rank in range(12)}
    assert all(member.is_empty for member in members.values())


def test_answers_do_not_depend_on_an_interruption(desk: Desk, members: dict[str, FakeMember]) -> None:
    for rank in range(10):
        desk.ask(f"c{rank}", max_tokens=6, temperature=0.8, seed=rank)
    assert desk.run().exit_code == 0
    whole = {line["custom_id"]: line["response"]["body"]["choices"] for line in desk.lines()}
    kept = desk.output.read_bytes().splitlines(keepends=True)[:4]
    desk.output.write_bytes(b"".join(kept) + b'{"id":"batch_req_1","custom_id":"c')
    assert desk.run("--resume").exit_code == 0
    assert {line["custom_id"]: line["response"]["body"]["choices"] for line in desk.lines()} == whole
    assert len(desk.lines()) == 10

"""The demo pair's members come and go in a real server beside streams of the other one; its file is read again."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import ROOT, serving

from ensemble_core.config import Config

ADMIN = {"Authorization": "Bearer sk-admin"}
STORY = {"model": "gemma3", "prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}
RECIPE = {"members": {"gemma3": 0.7, "smollm2": 0.3}, "main": "gemma3", "fusion": "projection"}
MB = 2**20


@dataclass
class Server:
    """A server process, its file and its log."""

    url: str
    process: subprocess.Popen[bytes]
    file: Path
    log: Path

    def change(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v1/admin/{path}", headers=ADMIN, json=body or {}, timeout=300)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    @property
    def resident(self) -> int:
        return int(httpx.get(f"{self.url}/v1/admin/members", headers=ADMIN, timeout=60).json()["rss_bytes"])

    def models(self) -> dict[str, str]:
        listed = httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]
        return {model["id"]: model["status"] for model in listed}

    def ask(self, model: str, max_tokens: int = 8) -> httpx.Response:
        body = {"model": model, "prompt": "The capital of France is", "max_tokens": max_tokens, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def reloaded(self, config: dict[str, Any], words: str) -> None:
        """Write the file, send SIGHUP, and wait for words in the log that were not there before."""
        start = len(self.log.read_text())
        self.file.write_text(yaml.safe_dump(config))
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 120
        while words not in self.log.read_text()[start:]:
            assert time.monotonic() < deadline, self.log.read_text()[start:]
            time.sleep(0.1)


def pair(**server: Any) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    for member in raw["members"].values():
        member["kv_memory"] = "256MiB"
    raw["ensembles"] = {"duet": RECIPE}
    raw["matrices"]["folder"] = str(ROOT / "matrices")
    raw["server"] |= {"admin_keys": ["sk-admin"], "max_choices": 4, **server}
    return raw


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    file, log = folder / "pair.yaml", folder / "server.log"
    file.write_text(yaml.safe_dump(pair()))
    with serving(file, log) as (url, process):
        yield Server(url, process, file, log)


@pytest.fixture(scope="module")
def server(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert demo_config.members.keys() == {"gemma3", "smollm2"}
    with running(tmp_path_factory.mktemp("admin")) as made:
        yield made


class Stories(threading.Thread):
    """Streams of one model, one after the other, until it is told to stop: texts, and when tokens came."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.url, self.max_tokens = url, max_tokens
        self.texts: list[str] = []
        self.times: list[float] = []
        self.failure: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        try:
            while not self.over.is_set():
                self.texts.append(self._one())
        except BaseException as error:
            self.failure = error

    def _one(self) -> str:
        body = {**STORY, "max_tokens": self.max_tokens, "stream": True}
        text, last = "", b""
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = yaml.safe_load(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    text += chunk["choices"][0]["text"]
                    self.times.append(time.monotonic())
                    last = line.encode()
        assert b'"length"' in last
        return text

    def largest_gap(self, begun: float, ended: float) -> float:
        times = [begun, *(t for t in self.times if begun <= t <= ended), ended]
        return max(b - a for a, b in pairwise(times))


def test_a_member_comes_and_goes_beside_streams_of_the_other(
    server: Server, record_property: Callable[[str, object], None]
) -> None:
    body = {**STORY, "max_tokens": 48}
    alone = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    duet = server.ask("duet").json()["choices"][0]["text"]
    stories = Stories(server.url, 48)
    stories.start()
    try:
        residents = []
        for leave, back, state in (
            ("unload", "load", "unloaded"),
            ("sleep", "wake", "asleep"),
            ("unload", "load", ""),
        ):
            before = server.resident
            assert server.change(f"members/smollm2/{leave}")["state"] == (state or "unloaded")
            assert server.models() == {
                "duet": "lacks_members",
                "smollm2": "lacks_members",
                "gemma3": "ready",
            }
            refused = server.ask("duet")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "lacks_members")
            assert "smollm2" in refused.json()["error"]["message"]
            if leave == "unload":
                assert server.resident < before - 150 * MB, "weights of 270 MB and what was cached"
            begun = time.monotonic()
            assert server.change(f"members/smollm2/{back}")["state"] == "ready"
            gap = stories.largest_gap(begun, time.monotonic())
            record_property(f"largest gap during {back}, in s, of {time.monotonic() - begun:.1f}", gap)
            assert set(server.models().values()) == {"ready"}
            assert server.ask("duet").json()["choices"][0]["text"] == duet
            residents.append(server.resident)
        assert abs(residents[-1] - residents[0]) < 60 * MB, residents
    finally:
        stories.over.set()
        stories.join(120)
    assert stories.failure is None
    assert len(stories.texts) >= 2
    assert set(stories.texts) == {alone}, "streams of the other say what they say alone"


def test_recipes_are_made_while_it_runs(server: Server) -> None:
    made = server.change("ensembles", {"name": "other", "recipe": {**RECIPE, "main": "smollm2"}})
    assert (made["model"]["id"], made["replaced"]) == ("other", False)
    assert server.ask("other").status_code == 200
    assert httpx.delete(f"{server.url}/v1/admin/ensembles/other", headers=ADMIN).status_code == 200
    assert server.ask("other").status_code == 404
    unmade = {"members": {"gemma3": 1, "smollm2": 1}, "main": "gemma3", "fusion": "relative"}
    answer = httpx.post(
        f"{server.url}/v1/admin/ensembles", headers=ADMIN, json={"name": "relative", "recipe": unmade}, timeout=120
    )
    has_matrices = any((ROOT / "matrices").glob("*gemma3*/*.safetensors"))
    assert answer.status_code == (200 if has_matrices else 400)
    assert has_matrices or "unisono build" in answer.json()["error"]["message"]


def test_the_file_is_read_again_on_sighup(server: Server) -> None:
    good = pair(max_choices=2)
    good["ensembles"]["reversed"] = {**RECIPE, "main": "smollm2"}
    good["members"]["smollm2"]["max_len"] = 1024
    server.reloaded(good, "the configuration is what the file says")
    assert server.models().keys() == {"duet", "reversed", "gemma3", "smollm2"}
    assert server.ask("reversed").status_code == 200
    assert httpx.get(f"{server.url}/v1/models/smollm2").json()["max_model_len"] == 1024
    body = {**STORY, "max_tokens": 2, "n": 3}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 400
    for wrong, words in (
        (
            {**good, "server": {**good["server"], "max_body_bytes": "8MiB", "host": "::1"}},
            "server.host: cannot be",
        ),
        ({**good, "ensembles": {"duet": {**RECIPE, "main": "nobody"}}}, "ensembles.duet"),
        ({**good, "members": {**good["members"], "third": {"model": "./nothing"}}}, "members.third"),
    ):
        server.reloaded(wrong, "nothing is changed")
        assert words in server.log.read_text().rpartition("SIGHUP")[2]
        assert server.models().keys() == {"duet", "reversed", "gemma3", "smollm2"}
        assert server.ask("reversed").status_code == 200

"""`unisono batch` as a process with the demo pair: killed in the middle, it goes on and answers the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from ensemble_core.config import Config

pytestmark = pytest.mark.slow  # three processes load the models

WORDS = ("a boat", "the sea", "中国", "😀", "fn main()")
WRONG = {"wrong-model": 404, "too-hot": 400}


def lines() -> list[str]:
    """20 lines: completions and chats, greedy and seeded, short and long; five are wrong."""
    asked: list[dict[str, Any]] = []
    for rank in range(15):
        own = {"max_tokens": 4 + 3 * rank % 25, "temperature": 0.8 * (rank % 2), "seed": rank}
        word = f"{WORDS[rank % len(WORDS)]} {rank}"
        if rank % 3:
            asked.append({"url": "/v1/completions", "body": {"model": "duet", "prompt": f"About {word}:", **own}})
        else:
            messages = [{"role": "user", "content": f"What is {word}?"}]
            body = {"model": "duet-smollm2", "messages": messages, **own}
            asked.append({"url": "/v1/chat/completions", "body": body})
    made = [json.dumps({"custom_id": f"line-{rank}", "method": "POST", **each}) for rank, each in enumerate(asked)]
    first = json.loads(made[0])
    body = {"model": "duet", "prompt": "x", "max_tokens": 4}
    wrong = [
        first,
        first | {"custom_id": "stream", "body": first["body"] | {"stream": True}},
        first | {"custom_id": "wrong-model", "url": "/v1/completions", "body": body | {"model": "nobody"}},
        first | {"custom_id": "too-hot", "url": "/v1/completions", "body": body | {"temperature": 3}},
    ]
    return [*made[:7], *map(json.dumps, wrong), '{"custom_id": "half', *made[7:]]


@pytest.fixture
def config(demo_config: Config, tmp_path: Path) -> Path:
    """The demo, deterministic, with few places, so that answers come one after the other."""
    text = (ROOT / "configs" / "demo.yaml").read_text()
    text = text.replace("# deterministic: false", "deterministic: true").replace(
        "max_running: 32", "max_running: 3"
    )
    text = (
        text.replace("../matrices", str(ROOT / "matrices"))
        .replace("1440MiB", "256MiB")
        .replace("1152MiB", "256MiB")
    )
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    (tmp_path / "in.jsonl").write_text("\n".join(lines()) + "\n", encoding="utf-8")
    return path


def batch(config: Path, output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [str(Path(sys.executable).parent / "unisono"), "batch", "--config", str(config)]
    command += ["--input", str(config.with_name("in.jsonl")), "--output", str(output), *options]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    try:
        told = process.communicate(timeout=240)[1].decode()
    finally:
        process.kill()
    return process.returncode, told


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path: Path) -> dict[str, Any]:
    """custom_id -> choices, of the lines that are answered."""
    return {
        each["custom_id"]: each["response"]["body"]["choices"]
        for each in results(path)
        if each["response"] and each["response"]["status_code"] == 200
    }


def test_a_killed_batch_goes_on_and_answers_the_same(config: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    code, told = ended(batch(config, whole))
    assert code == 1, told
    assert "20 lines, 15 completed, 5 failed" in told
    assert answers(whole).keys() == {f"line-{rank}" for rank in range(15)}

    process = batch(config, cut)
    try:
        deadline = time.monotonic() + 240
        while not cut.exists() or len(cut.read_bytes().splitlines()) < 9:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = answers_of_whole_lines(cut)
    assert 0 < len(before) < 15
    with cut.open("ab") as file:
        file.write(b'{"id":"batch_req_0","custom_id":"line-14","respon')  # as if the kill had hit a write

    code, told = ended(batch(config, cut))
    assert code == 1
    assert "--resume" in told
    code, told = ended(batch(config, cut, "--resume"))
    assert code == 1, told
    assert f"20 lines, 15 completed ({len(before)} of them before), 5 failed" in told
    assert answers(cut) == answers(whole)
    assert len(results(cut)) == 20
    refused = {each["custom_id"]: each["response"]["status_code"] for each in results(cut) if each["response"]}
    assert {name: refused[name] for name in WRONG} == WRONG
    faults = [each["error"]["line"] for each in results(cut) if each["error"]]
    assert sorted(faults) == [8, 9, 12]


def answers_of_whole_lines(path: Path) -> set[str]:
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.rfind(b"\n") + 1])
    return set(answers(path))

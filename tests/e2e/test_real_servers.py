"""The demo pair with SmolLM2 behind real servers: texts are the local pair's, and every trouble has its own error."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, wait_until_ready
from prompts import PROMPTS

from ensemble_core.config import Config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import HostError, InvalidRequestError
from ensemble_core.hosts import HostConfig, ServerHost
from ensemble_core.llm import LLM, Completion
from ensemble_core.members.loading.checkpoints import resolve_folder

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
KEY = "sk-of-the-far-server"
FAR = "smollm2"
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, logprobs=2)
CLOSE = 2e-3  # nats between two tokens; the servers' numbers differ by less


@dataclass
class Server:
    """A real server."""

    kind: str
    url: str
    process: subprocess.Popen[bytes]


def missing(what: str) -> None:
    """A failure in CI, a skip elsewhere."""
    (pytest.fail if "UNISONO_CI" in os.environ else pytest.skip)(what)


@contextmanager
def served(
    kind: str, command: list[str | Path], port: int, log: Path, environment: dict[str, str]
) -> Iterator[Server]:
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        wait_until_ready(process, url, log, 300.0, "/health")
        yield Server(kind, url, process)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """The server with its engine, which is in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def vllm(folder: Path, log: Path) -> Iterator[Server]:
    if not PYTHON.exists():
        missing(".venv-vllm is missing, run `make .venv-vllm/installed`")
    port = free_port()
    command: list[str | Path] = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", FAR, "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"]
    command += ["--max-logprobs", "256", "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY]
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with served("vllm", command, port, log, environment) as server:
        yield server


@contextmanager
def llamacpp(folder: Path, log: Path) -> Iterator[Server]:
    program = os.environ.get("UNISONO_LLAMA_SERVER") or shutil.which("llama-server")
    if program is None:
        pytest.skip("no llama-server: set UNISONO_LLAMA_SERVER to one (docs/distributed.md says how to build it)")
    model = os.environ.get("UNISONO_LLAMA_GGUF")
    if model is None:
        pytest.skip("UNISONO_LLAMA_GGUF names no file of SmolLM2-135M's weights in float32")
    port = free_port()
    command: list[str | Path] = [
        program,
        "-m",
        model,
        "--port",
        str(port),
        "-c",
        "16384",
        "-np",
        "8",
        "--api-key",
        KEY,
    ]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    with served("llamacpp", command, port, log, {}) as server:
        yield server


SERVERS = {"vllm": vllm, "llamacpp": llamacpp}


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, demo_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with SERVERS[request.param](resolve_folder(demo_config.members[FAR]), log) as running:
        yield running


@pytest.fixture(scope="module")
def exact(demo_config: Config) -> Config:
    """The demo in float32, with a recipe that drops."""
    members = {
        name: member.model_copy(update={"dtype": "float32", "kv_memory": 2 * 2**30})
        for name, member in demo_config.members.items()
    }
    dropping = demo_config.ensembles["duet"].model_copy(update={"on_member_failure": "drop"})
    ensembles = {**demo_config.ensembles, "dropping": dropping}
    return demo_config.model_copy(update={"members": members, "ensembles": ensembles})


@pytest.fixture(scope="module")
def expected(exact: Config) -> dict[str, list[Completion]]:
    llm = LLM(exact)
    found = {model: llm.generate(PROMPTS, GREEDY, model=model) for model in ("duet", "duet-smollm2")}
    llm.close()
    return found


def far(config: Config, server: Server, **changes: Any) -> Config:
    """The same, with SmolLM2 on the server."""
    host = HostConfig(server=ServerHost(kind=server.kind, url=server.url, api_key_env="FAR_KEY", timeout=60.0))  # type: ignore[arg-type]
    member = config.members[FAR]
    moved = type(member)(model=changes.pop("model", member.model), max_len=2048, host=host)
    scheduler = config.scheduler.model_copy(update=changes)
    return config.model_copy(update={"members": config.members | {FAR: moved}, "scheduler": scheduler})


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)


def assert_same(mine: Completion, theirs: Completion, where: str) -> None:
    """Token by token, up to the first place where two of them are as good as equal."""
    for at, (a, b) in enumerate(zip(mine.logprobs, theirs.logprobs, strict=False)):
        if a.token_id != b.token_id:
            (_, _, first), (_, _, second) = b.top[:2]
            assert first - second < CLOSE, f"{where}: token {at} is {a.token_id}, not {b.token_id}"
            return
    assert mine.text == theirs.text


@pytest.mark.slow
def test_texts_are_the_local_pair_s(
    key: None, exact: Config, server: Server, expected: dict[str, list[Completion]]
) -> None:
    llm = LLM(far(exact, server))
    try:
        equal = 0
        for model, texts in expected.items():
            for prompt, mine, theirs in zip(
                PROMPTS, llm.generate(PROMPTS, GREEDY, model=model), texts, strict=True
            ):
                assert_same(mine, theirs, f"{model}: {prompt}")
                equal += mine.text == theirs.text
        assert equal >= len(PROMPTS), "hardly any text is the same to its end"
        biased = replace(GREEDY, logit_bias=((260, 8.0), (345, 4.0)), max_tokens=4)
        assert llm.generate(PROMPTS[:2], biased, model="duet-smollm2")
        if server.kind == "vllm":
            with pytest.raises(InvalidRequestError, match="needs whole distributions, and member 'smollm2'"):
                llm.generate(
                    "a", replace(GREEDY, form=TextForm("json", '{"type": "object"}')), model="duet-smollm2"
                )
        with pytest.raises(
            InvalidRequestError, match="echo needs every position of the prompt, and member 'smollm2'"
        ):
            llm.generate("a", replace(GREEDY, echo=True), model="duet")
        for member in llm.members.values():
            assert member.free_pages == member.num_pages
    finally:
        llm.close()


@pytest.mark.slow
def test_wrong_settings_have_their_errors(exact: Config, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "sk-wrong")
    with pytest.raises(HostError, match="it does not accept the key; correct the key in FAR_KEY") as caught:
        LLM(far(exact, server))
    assert "sk-wrong" not in str(caught.value)
    monkeypatch.setenv("FAR_KEY", KEY)
    with pytest.raises(HostError, match="has another tokenizer"):
        LLM(far(exact.model_copy(update={"ensembles": {}}), server, model=exact.members["gemma3"].model))
    if server.kind == "vllm":
        with pytest.raises(HostError, match="start it with --max-logprobs 300 or more"):
            LLM(far(exact, server, num_candidates=300))


@pytest.mark.slow
def test_a_server_that_dies_in_mid_stream(key: None, exact: Config, server: Server) -> None:
    """The last test of the server: it is gone afterwards."""
    llm = LLM(far(exact, server))
    try:
        (sequence,) = llm._requests([PROMPTS[0]], [GREEDY], "dropping", None, watched=False)
        outputs, news = [], llm._run([sequence])
        while sum(len(output.token_ids) for output in outputs) < 4:
            outputs.append(next(news)[1])
        end(server.process)
        outputs += [output for _, output in news]
        assert outputs[-1].finish_reason in ("length", "stop")
        assert dict(outputs[-1].dropped) == {FAR: "lost"}
        with pytest.raises(Exception, match="cannot be reached"):
            llm.generate(PROMPTS[0], GREEDY, model="duet")
    finally:
        llm.close()

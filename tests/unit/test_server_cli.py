from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_runtime import FakeRuntime
from typer.testing import CliRunner

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import CheckpointError
from ensemble_core.server_config import ServerConfig
from server.cli import app

CONFIG = """
members: {a: {model: ./a}, b: {model: ./b}}
ensembles: {duo: {members: {a: 1, b: 1}, main: a}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Put a module in the place of one that would load models."""
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    __import__(parent)
    monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


def test_version() -> None:
    assert invoke("--version").output.startswith("unisono ")


def test_the_playground_without_models_is_a_demo() -> None:
    result = invoke("playground")
    assert result.exit_code == 1
    assert (
        "`unisono serve` shows the playground of its models at /; for stored answers add --demo" in result.stderr
    )


@pytest.mark.parametrize("command", ["serve", "batch", "build", "pull", "generate"])
def test_every_command_takes_a_config(command: str) -> None:
    assert "--config" in invoke(command, "--help").output


@pytest.mark.parametrize("command", [["serve"], ["build"], ["pull"]])
def test_a_wrong_config_is_one_line_and_a_failure(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("members: {a: {model: x, kv_memory: huge}}\nserver: {port: -1}\n")
    result = invoke(*command, "--config", str(path))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "members.a.kv_memory" in line
    assert "server.port" in line


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys; from server.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn', 'tqdm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_bars_are_off_without_a_terminal(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "")
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    stand_in(monkeypatch, "ensemble_core.members.loading.checkpoints", pull=lambda _config: [])
    assert invoke("pull", "--config", config).exit_code == 0
    assert os.environ["TQDM_DISABLE"] == os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_pull_names_each_folder(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    folders = [("a", Path("/models/a")), ("b", Path("/models/b"))]
    stand_in(monkeypatch, "ensemble_core.members.loading.checkpoints", pull=lambda config: folders)
    assert invoke("pull", "--config", config).stdout == "a: /models/a\nb: /models/b\n"


def test_an_error_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    def pull(_config: Any) -> None:
        raise CheckpointError("member 'a': its files are\nmissing")

    stand_in(monkeypatch, "ensemble_core.members.loading.checkpoints", pull=pull)
    result = invoke("pull", "--config", config)
    assert result.exit_code == 1
    assert result.stderr == "unisono: member 'a': its files are missing\n"


@pytest.mark.parametrize(
    ("flags", "force", "missing"), [([], False, False), (["--force"], True, False), (["--missing"], False, True)]
)
def test_build_reports_each_matrix(
    monkeypatch: pytest.MonkeyPatch, config: str, flags: list[str], force: bool, missing: bool
) -> None:
    asked: list[tuple[bool, bool]] = []
    quality = SimpleNamespace(median=0.5, median_anchors=0.25)

    def build_matrices(_config: Any, *, force: bool, only_missing: bool) -> list[Any]:
        asked.append((force, only_missing))
        done = {"path": Path("m/a.safetensors"), "quality": quality, "num_bytes": 2_500_000}
        built = SimpleNamespace(member="a", seconds=12.4, skipped=False, **done)
        return [built, SimpleNamespace(member="b", seconds=0.0, skipped=True, **done)]

    stand_in(monkeypatch, "ensemble_core.transfer.build", build_matrices=build_matrices)
    lines = invoke("build", "--config", config, *flags).stdout.splitlines()
    assert asked == [(force, missing)]
    mass = "2.5 MB, retained mass: median 50.0%, anchors 25.0%"
    assert lines == [
        f"a: m/a.safetensors ({mass}) built in 12 s",
        f"b: m/a.safetensors ({mass}) fits, kept",
    ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """What `unisono serve` would have served; loading and serving are left out."""
    found: list[ServerConfig] = []
    stand_in(monkeypatch, "ensemble_core.runtime", Runtime=lambda _config, _sink: FakeRuntime())

    def serve(_app: Any, _runtime: Any, config: ServerConfig, _say: Any, read: Any) -> None:
        assert read().server == config, "a reload reads the same file under the same options"
        found.append(config)

    monkeypatch.setattr("server.edge.serving.serve", serve)
    monkeypatch.delenv("UNISONO_API_KEYS", raising=False)
    monkeypatch.delenv("UNISONO_API_KEY", raising=False)
    return found


def keys_of(config: ServerConfig) -> list[str]:
    return [key.get_secret_value() for key in config.api_keys]


def test_serve_options_take_the_place_of_fields(config: str, served: list[ServerConfig]) -> None:
    options = ["--host", "h", "--port", "5", "--root-path", "/llm", "--cors-origin", "https://a.org"]
    options += ["--cors-origin", "https://b.org", "--tls-cert-file", "c.pem", "--tls-key-file", "k.pem"]
    options += ["--tls-key-password-env", "PW"]
    assert invoke("serve", "--config", config, *options).exit_code == 0
    assert served == [
        ServerConfig(
            host="h",
            port=5,
            root_path="/llm",
            cors_origins=("https://a.org", "https://b.org"),
            tls_cert_file=Path("c.pem"),
            tls_key_file=Path("k.pem"),
            tls_key_password_env="PW",
        )
    ]


def test_without_options_the_file_says_it_all(config: str, served: list[ServerConfig]) -> None:
    assert invoke("serve", "--config", config).exit_code == 0
    assert served == [ServerConfig()]


def test_keys_of_the_file_and_of_the_options_add_up(
    config: str, served: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(config).write_text(CONFIG + "server: {api_keys: [own]}\n")
    assert invoke("serve", "--config", config, "--api-key", "one", "--api-key", "two,three").exit_code == 0
    assert keys_of(served[0]) == ["own", "one", "two", "three"]
    monkeypatch.setenv("UNISONO_API_KEYS", "env-one, env-two")
    assert invoke("serve", "--config", config).exit_code == 0
    assert keys_of(served[1]) == ["own", "env-one", "env-two"]


def test_both_variables_are_read_and_add_up(
    config: str, served: list[ServerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNISONO_API_KEY", "one")
    assert invoke("serve", "--config", config).exit_code == 0
    monkeypatch.setenv("UNISONO_API_KEYS", "two,three")
    assert invoke("serve", "--config", config).exit_code == 0
    assert invoke("serve", "--config", config, "--api-key", "four").exit_code == 0
    found = [["one"], ["one", "two", "three"], ["four", "one", "two", "three"]]
    assert [keys_of(each) for each in served] == found


@pytest.mark.parametrize("name", ["UNISONO_API_KEY", "UNISONO_API_KEYS"])
@pytest.mark.parametrize("value", ["", " , "])
def test_a_variable_that_holds_no_key_does_not_open_the_door(
    config: str, served: list[ServerConfig], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    result = invoke("serve", "--config", config)
    assert result.exit_code == 1
    assert f"{name}: is set and holds no key" in result.stderr
    assert served == []


def test_no_help_shows_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISONO_API_KEYS", "sk-secret")
    monkeypatch.setenv("UNISONO_API_KEY", "sk-secret")
    assert "sk-secret" not in invoke("serve", "--help").output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--root-path", "llm"], "server.root_path: "),
        (["--tls-cert-file", "c.pem"], "server: tls_cert_file and tls_key_file go together"),
        (["--api-key-file", "nowhere/keys"], "server.api_key_file: nowhere/keys cannot be read"),
        (["--api-key", "sk secret"], "server.api_keys: a key must be visible ASCII"),
    ],
)
def test_wrong_serve_options_are_one_line(
    config: str, served: list[ServerConfig], options: list[str], words: str
) -> None:
    result = invoke("serve", "--config", config, *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert words in line
    assert "secret" not in line
    assert served == []


class FakeLLM:
    calls: list[tuple[Any, ...]]

    def __init__(self, config: Path) -> None:
        FakeLLM.calls = [(config,)]

    def generate(self, prompts: list[str], params: SamplingParams, model: str | None = None) -> list[Any]:
        FakeLLM.calls.append((prompts, params, model))
        return [SimpleNamespace(text=f"<{prompt}>") for prompt in prompts]

    def stream(self, prompt: str, params: SamplingParams, model: str | None = None) -> Any:
        FakeLLM.calls.append((prompt, params, model))
        yield from ("<", prompt, ">")

    def close(self) -> None:
        FakeLLM.calls.append(("closed",))


def test_generate_prints_texts(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    stand_in(monkeypatch, "ensemble_core.llm", LLM=FakeLLM)
    options = ["--max-tokens", "5", "--temperature", "0", "--seed", "3", "--stop", "x", "--stop", "y"]
    result = invoke("generate", "p", "q", "--config", config, "--model", "duo", *options)
    assert result.stdout == "<p>\n\n<q>\n"
    params = SamplingParams(max_tokens=5, temperature=0.0, seed=3, stop=("x", "y"))
    assert FakeLLM.calls == [(Path(config),), (["p", "q"], params, "duo"), ("closed",)]


def test_generate_streams(monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    stand_in(monkeypatch, "ensemble_core.llm", LLM=FakeLLM)
    assert invoke("generate", "p", "q", "--config", config, "--stream").stdout == "<p>\n\n<q>\n"


def test_generate_refuses_what_the_server_refuses(config: str) -> None:
    result = invoke("generate", "p", "--config", config, "--stop", "")
    assert result.exit_code == 1
    assert "stop string" in result.stderr

"""Other projects' clients against the demo pair: each does what docs/clients.md says, and asks no other host.

A client's script runs in a venv of its own; `make test-clients` builds them. Elsewhere what is missing is skipped.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_runtime import FakeRuntime, live_server, outputs_of

from ensemble_core.decoding.requests import Conversation, GenerationRequest, Output
from ensemble_core.text.tools import CallPiece

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "clients"
DOCUMENT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
CLIENTS = sorted(path.stem.removeprefix("with_") for path in FOLDER.glob("with_*.py"))
MODEL = "duet-smollm2"
# A client that goes past the audit hook of its process (a program of its own) finds no way out either.
NO_WAY_OUT = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
NO_WAY_OUT |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1"}


def rows() -> dict[str, dict[str, str]]:
    """The document's table of clients: package -> column -> cell."""
    table = DOCUMENT.partition("<!-- clients: begin -->\n")[2].partition("<!-- clients: end -->")[0]
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {line[1].strip("`"): dict(zip(head, line, strict=True)) for line in lines}


def pinned(client: str) -> list[str]:
    lines = (FOLDER / f"requirements-{client}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def python_of(client: str) -> Path:
    folder = ROOT / ".venv-clients" / client
    if not (folder / "installed").exists():
        missing = f"{folder.relative_to(ROOT)} is missing, run `make test-clients`"
        (pytest.fail if "UNISONO_CLIENTS" in os.environ else pytest.skip)(missing)
    return folder / "bin" / "python"


@pytest.mark.parametrize("client", CLIENTS)
def test_versions_are_pinned_and_told(client: str) -> None:
    packages = pinned(client)
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+-]+", package) for package in packages)
    assert not [package for package in packages if package.startswith(("torch==", "transformers=="))]
    name, version = packages[0].split("==")
    assert rows()[name]["version"] == version


def test_every_row_has_a_script() -> None:
    assert len(rows()) == len(CLIENTS) == len(list(FOLDER.glob("requirements-*.txt")))


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_does_what_the_document_says(server_url: str, client: str) -> None:
    command = [str(python_of(client)), str(FOLDER / f"with_{client}.py"), f"{server_url}/v1", MODEL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | NO_WAY_OUT)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, told["failed"], told["other_hosts"]) == (0, {}, []), done.stderr[-2000:]
    row = rows()[told["client"]]
    assert row["version"] == told["version"]
    said = {column: cell for column, cell in row.items() if column not in ("client", "package", "version")}
    assert {column for column, cell in said.items() if cell == "yes"} == set(told["can"]) & set(said)
    assert {column: cell for column, cell in said.items() if cell not in ("yes", "-")} == {
        column: f"no: {why}" for column, why in told["cannot"].items()
    }


class CallsOnce(FakeRuntime):
    """Asks for a call, and says what it returned once it has the result."""

    def _outputs(self, request: GenerationRequest) -> list[Output]:
        assert isinstance(request.prompt, Conversation)
        last = request.prompt.messages[-1]
        if last["role"] == "tool":
            return outputs_of(("So: ", last["content"]), request.prompt)
        call = (CallPiece(0, "", "double", "call_a"), CallPiece(0, '{"x"'), CallPiece(0, ": 21}"))
        return outputs_of(call, request.prompt)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--no-stream",), ("--responses",)])
def test_the_llm_command_carries_calls_out(options: tuple[str, ...], tmp_path: Path) -> None:
    program = python_of("llm").with_name("llm")
    function = "def double(x: int) -> int:\n    return x * 2"
    with live_server(CallsOnce()) as url:
        command = [str(program), "openai", "endpoint", f"{url}/v1", "Double 21.", "-m", "duo", *options]
        done = subprocess.run(
            [*command, "--functions", function],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | NO_WAY_OUT | {"LLM_USER_PATH": str(tmp_path)},
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "So: 42"

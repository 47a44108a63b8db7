"""Server processes, a port for one and the wait until it is ready; the programs that tests need."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> str:
    """A program of the development tools, or of the system. Without it: a failure in CI, a skip elsewhere."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None and "UNISONO_CI" in os.environ:
        pytest.fail(f"{name} is missing; .ci/run and the dev extra install it")
    if found is None:
        pytest.skip(f"{name} is missing")
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(
    process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 180.0, path: str = "/ready"
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(f"{url}{path}").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server was not ready within {seconds:.0f} s:\n{log.read_text()}")


@contextmanager
def served(config: Path, log: Path) -> Iterator[str]:
    """The address of `unisono serve --config FILE`, a path from the root of the project; it must end cleanly."""
    with serving(config, log) as (url, _):
        yield url


@contextmanager
def serving(config: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same, with its process."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "unisono"), "serve", "--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield url, process
        process.terminate()
        assert process.wait(timeout=60) in (0, -15), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()

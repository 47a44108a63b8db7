"""A real server process with the demo pair, shared by the end-to-end tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_runtime import free_port

from ensemble_core.config import Config

ROOT = Path(__file__).parents[2]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the server was not ready within {seconds:.0f} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server_url(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `unisono serve --config configs/demo.yaml`; it must end cleanly."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [str(Path(sys.executable).parent / "unisono"), "serve", "--config", "configs/demo.yaml"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        yield url
        process.terminate()
        assert process.wait(timeout=60) in (0, -15), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()

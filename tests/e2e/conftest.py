"""A real server process with the demo pair, shared by the end-to-end tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import free_port, wait_until_ready

from ensemble_core.config import Config

ROOT = Path(__file__).parents[2]


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

"""A real server process with the demo pair, shared by the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import served

from ensemble_core.config import Config


@pytest.fixture(scope="session")
def server_url(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `unisono serve --config configs/demo.yaml`; it must end cleanly."""
    with served(Path("configs/demo.yaml"), tmp_path_factory.mktemp("server") / "server.log") as url:
        yield url

"""Fixtures for all tests: tiny random models made on the spot, and the demo pair where a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

# Tests never touch the network; models that are not made here or fetched before are an error.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import KINDS, Kind, tiny_checkpoint

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.errors import UnisonoError
from ensemble_core.members.loading.checkpoints import resolve_folder

DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    """Kind -> folder of a tiny random model with its tokenizer; shared, so read only."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_checkpoint(kind, root / kind, seed=seed) for seed, kind in enumerate(KINDS)}


@pytest.fixture(scope="session")
def demo_config() -> Config:
    """configs/demo.yaml, with both models fetched. Fails, rather than skips, where they are not."""
    config = load_config(DEMO_CONFIG)
    try:
        for member in config.members.values():
            resolve_folder(member)
    except UnisonoError as error:
        pytest.fail(f"the demo models are missing, run `make models`: {error}")
    return config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Schemathesis names its tests by route but not their ids, and xdist runs one test of each id."""
    for item in items:
        if not item.nodeid.endswith(item.name) and item.parent is not None:
            item._id = item.parent.id.child(item.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports go between processes as UTF-8; what hostile tests log has lone surrogates."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report

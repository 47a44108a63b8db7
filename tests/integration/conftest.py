"""Fixtures of the playground's tests: one Chromium, and a server with an engine for each file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from browsers import chromium  # here: other tests need no Playwright

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a playground over three members that write letters."""
    from playground_servers import engine_server

    with engine_server() as url:
        yield url

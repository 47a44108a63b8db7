"""The log as the server writes it, for tests."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from unittest import mock

from server.edge import logs

_LOGGERS = ("", "server", "ensemble_core", "uvicorn")


@contextmanager
def captured(level: str = "info", form: Literal["text", "json"] = "text") -> Iterator[io.StringIO]:
    """Configure logging as `unisono serve` does, with this in the place of stderr; then undo it."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], [logging.getLogger(name).level for name in _LOGGERS]
    root.handlers.clear()
    try:
        with mock.patch.object(sys, "stderr", io.StringIO()) as log:
            logs.configure(level, form)
        assert isinstance(log, io.StringIO)
        yield log
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        for name, before in zip(_LOGGERS, levels, strict=True):
            logging.getLogger(name).setLevel(before)

"""Log records as lines of text or of JSON, with the request's id in every one.

The id is in a context variable, so code that serves a request need not pass it on. The engine's thread serves many
requests at once and has no such id; its lines name the completions, whose ids the access log gives too.

Invariant: whatever a message or an exception quotes, it cannot begin a line that looks like a record. As text, a
record is one line, and the lines of its traceback are indented; as JSON, a record is one line. Characters that move
the cursor, hide text or change its direction are escaped. This module does not know requests.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")

Format = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"
_OURS = ("server", "ensemble_core")
_INDENT = "    "
# C0, DEL, C1; Arabic letter mark, zero width and direction; separators; direction; joiners, isolates; half a
# surrogate pair; byte order mark.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escaped(text: str) -> str:
    """The text on one line, without characters that a terminal obeys."""
    return _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    return _SHORT.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}")


def fields(**values: object) -> dict[str, Any]:
    """`extra` of a record: JSON has the values as keys of their own; as text, the message has to name them."""
    return {"fields": values}


class RequestIdFilter(logging.Filter):
    """Gives every record a `request_id`; drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the id. Always true."""
        record.request_id = REQUEST_ID.get()
        return True


class TextFormatter(logging.Formatter):
    """One line, then the traceback, if any, in indented lines."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines. Not the base's, which shares its unescaped traceback with other formatters."""
        record.message = record.getMessage()
        record.asctime = self.formatTime(record)
        return "\n".join((escaped(self.formatMessage(record)), *map(_indented, _trace(self, record))))


class JsonFormatter(logging.Formatter):
    """One JSON object, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": escaped(record.getMessage()),
        }
        extra: Mapping[str, Any] = getattr(record, "fields", {})
        told |= {name: value for name, value in extra.items() if name not in told}
        if trace := _trace(self, record):
            told["exception"] = "\n".join(map(escaped, trace))
        return json.dumps(told, default=str)


def _indented(line: str) -> str:
    return _INDENT + escaped(line)


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    """The lines of the record's traceback and stack."""
    found = [formatter.formatException(record.exc_info)] if record.exc_info else []
    found += [record.stack_info] if record.stack_info else []
    return [line for text in found for line in text.split("\n")]


def configure(level: str, form: Format = "text") -> None:
    """Log to stderr: our loggers at `level`, the HTTP server's at info, all others at warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    set_level(level)


def set_level(level: str) -> None:
    """Our loggers log from `level` on."""
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())

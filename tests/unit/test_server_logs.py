"""Lines of the log: what a record becomes as text and as JSON, and what of a body's keys may be said."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from captured_logs import captured
from fake_runtime import FakeRuntime

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.logs import REQUEST_ID, escaped, fields
from server.edge.metrics import PrometheusMetrics
from server.schema.names import declared_names, declared_part, properties

HOSTILE = (
    "a\r\n2026-01-01 00:00:00,000 INFO server [-] forged\x00\x1b[2K\x7f\x9b\u2028\u2029\u202e\u2066\ufeff\ud800z"
)
UNSAFE = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, 0x2028, 0x2029]
UNSAFE += [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0xD800, 0xDFFF]


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    with captured("info", request.param) as log:
        yield log


def lines_of(log: io.StringIO) -> list[str]:
    """As any reader may split them, at every kind of line end."""
    return log.getvalue().splitlines()


@pytest.mark.parametrize("code", UNSAFE)
def test_no_unsafe_character_is_left(code: int) -> None:
    text = escaped(f"a{chr(code)}b")
    assert text.isascii()
    assert text.isprintable()
    assert text != "ab"


def test_other_text_stays() -> None:
    assert escaped("Grüße, 世界 😀 \\n 'x'") == "Grüße, 世界 😀 \\n 'x'"


def test_a_hostile_message_is_one_line(log: io.StringIO) -> None:
    logging.getLogger("server.x").warning("given: %s", HOSTILE)
    (line,) = lines_of(log)
    assert "forged" in line
    assert "\x1b" not in line


def test_a_hostile_exception_begins_no_record(log: io.StringIO) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("server.x").exception("failed: %s", HOSTILE)
    first, *rest = lines_of(log)
    assert "failed: a" in first
    assert all(line.startswith("    ") for line in rest)
    assert "forged" in log.getvalue()
    assert "\x1b" not in log.getvalue()
    assert "raise ValueError(HOSTILE)" in log.getvalue()  # the traceback itself can be read


def test_another_formatter_does_not_undo_the_escaping(log: io.StringIO) -> None:
    """The base class keeps the traceback's text on the record, for all handlers."""
    record = logging.LogRecord("server.x", logging.ERROR, "p", 1, "m", (), None)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record.exc_info = sys.exc_info()
    logging.Formatter().format(record)
    logging.getLogger().handle(record)
    assert all(line.startswith("    ") for line in lines_of(log)[1:])


def test_text() -> None:
    with captured("info", "text") as log:
        token = REQUEST_ID.set("mine")
        logging.getLogger("server.x").info("a %s", "b", extra=fields(c=1))
        REQUEST_ID.reset(token)
    assert log.getvalue().endswith(" INFO server.x [mine] a b\n")


def test_json() -> None:
    with captured("info", "json") as log:
        token = REQUEST_ID.set("mine")
        logging.getLogger("server.x").info("é %s", "b", extra=fields(c=1, d=None, message="not this"))
        REQUEST_ID.reset(token)
        logging.getLogger("server.x").info("after")
    first, second = map(json.loads, log.getvalue().splitlines())
    assert first.pop("time")[-6:] == "+00:00"
    told = {"level": "INFO", "logger": "server.x", "request_id": "mine", "message": "é b", "c": 1, "d": None}
    assert first == told
    assert second["request_id"] == "-"


@pytest.mark.parametrize("name", ["uvicorn.error", "asyncio", "opentelemetry.sdk"])
def test_other_libraries_go_through_the_same_formatter(log: io.StringIO, name: str) -> None:
    logging.getLogger(name).error("a\nb")
    warnings.warn("c\nd", UserWarning, stacklevel=1)
    first, second = lines_of(log)
    assert "a\\nb" in first.replace("\\\\", "\\")
    assert "c\\nd" in second.replace("\\\\", "\\")


def test_every_field_of_every_body_is_a_declared_name() -> None:
    document = create_app(FakeRuntime(), ServerConfig(), PrometheusMetrics()).openapi()  # type: ignore[arg-type]
    assert {"model", "options", "weights", "schema", "tools"} <= declared_names()
    bodies = [
        operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for operations in document["paths"].values()
        for operation in operations.values()
        if "requestBody" in operation
    ]
    assert len(bodies) >= 4
    reached = _reached(document["components"]["schemas"], bodies)
    for name in reached:
        assert properties(document["components"]["schemas"][name]) <= declared_names(), name


def _reached(schemas: dict[str, Any], names: list[str]) -> set[str]:
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            names += [other for other in schemas if f'schemas/{other}"' in json.dumps(schemas[name])]
    return found


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("max_tokens", "max_tokens"),
        ("messages.3.content", "messages.3.content"),
        ("ensemble.weights.my secret", "ensemble.weights"),
        ("ensemble.secret\nINFO forged", "ensemble"),
        ("secret.model", None),
        ("ensemble." + "9" * 60_000, "ensemble"),
        ("messages.٣.content", "messages"),
        ("", None),
        (None, None),
    ],
)
def test_only_declared_names_of_a_path_are_said(path: str | None, said: str | None) -> None:
    assert declared_part(path) == said

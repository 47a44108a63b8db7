from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_core.server_config import ServerConfig
from server.edge.bodies import BodyLimit
from server.edge.live import LiveConfig
from server.edge.logs import REQUEST_ID, RequestIdFilter
from server.edge.middleware import RequestContext, choose_request_id

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/x", "headers": []}


def call(app: ASGIApp, headers: list[tuple[bytes, bytes]], *bodies: bytes) -> list[Message]:
    """What the app sends for a request whose body comes in the given parts."""
    messages = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    messages += [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(SCOPE | {"headers": headers}, receive, send))  # type: ignore[arg-type]
    return sent


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{len(body)} {REQUEST_ID.get()}")(scope, receive, send)


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise RuntimeError("a bug")


async def broken_later(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("a bug")


@pytest.mark.parametrize("sent", ["a", "x" * 128, "req-1/2:{}~!"])
def test_a_fit_request_id_is_kept(sent: str) -> None:
    assert choose_request_id(sent) == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 129, "a b", "a\tb", "é", "a\n"])
def test_any_other_request_id_is_replaced(sent: str | None) -> None:
    ids = {choose_request_id(sent) for _ in range(2)}
    assert len(ids) == 2
    assert sent not in ids


def test_the_id_is_in_the_answer_and_in_the_context() -> None:
    start, body = call(RequestContext(echo), [(b"x-request-id", b"mine")], b"ab")
    assert (b"x-request-id", b"mine") in start["headers"]
    assert body["body"] == b"2 mine"
    assert REQUEST_ID.get() == "-"


def test_a_bug_is_a_500_in_our_shape_with_the_id(caplog: pytest.LogCaptureFixture) -> None:
    start, body = call(RequestContext(broken), [(b"x-request-id", b"mine")])
    assert start["status"] == 500
    assert (b"x-request-id", b"mine") in start["headers"]
    assert b'"internal_error"' in body["body"]
    assert b"a bug" not in body["body"]
    assert "a bug" in caplog.text


def test_a_bug_after_the_headers_breaks_the_connection() -> None:
    with pytest.raises(RuntimeError):
        call(RequestContext(broken_later), [])


def of_ten_bytes() -> LiveConfig:
    return LiveConfig(ServerConfig().model_copy(update={"max_body_bytes": 10}))


@pytest.mark.parametrize(
    ("headers", "bodies"),
    [
        ([(b"content-length", b"11")], [b"x" * 11]),
        ([(b"content-length", b"11")], []),  # refused by what it says, before anything is read
        ([], [b"x" * 11]),
        ([], [b"x" * 6, b"x" * 5]),
        ([(b"content-length", b"4")], [b"x" * 11]),
    ],
)
def test_bodies_over_the_limit_raise_where_they_are_read(
    headers: list[tuple[bytes, bytes]], bodies: list[bytes]
) -> None:
    with pytest.raises(Exception, match="10 bytes") as caught:
        call(BodyLimit(echo, of_ten_bytes()), headers, *bodies)
    assert caught.value.status_code == 413  # type: ignore[attr-defined]


def test_a_limit_that_a_reload_changes_holds_at_once() -> None:
    live = of_ten_bytes()
    app = BodyLimit(echo, live)
    live.config = live.config.model_copy(update={"max_body_bytes": 4})
    with pytest.raises(Exception, match="4 bytes"):
        call(app, [], b"x" * 6)


def test_a_body_at_the_limit_passes() -> None:
    for headers in ([], [(b"content-length", b"10")]):
        _start, body = call(BodyLimit(echo, of_ten_bytes()), headers, b"x" * 6, b"x" * 4)
        assert body["body"].startswith(b"10 ")


def test_every_record_gets_the_id() -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "m", (), None)
    token = REQUEST_ID.set("mine")
    try:
        assert RequestIdFilter().filter(record)
    finally:
        REQUEST_ID.reset(token)
    assert record.request_id == "mine"  # type: ignore[attr-defined]

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from pydantic import BaseModel
from starlette.types import Message

from ensemble_core.errors import MemberError
from server.api import streams
from server.api.streams import DONE, EventStream, Wire, begin, encode, event, unless_gone
from server.edge.errors import ClientGoneError


class Piece(BaseModel):
    text: str


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def at_once() -> Message:
    return {"type": "http.disconnect"}


async def there(piece: Piece) -> BaseModel:
    return piece


def collect(first: Piece, rest: AsyncGenerator[BaseModel]) -> list[str]:
    async def run() -> list[str]:
        return [item async for item in encode(there(first), rest, Wire())]

    return asyncio.run(run())


async def pieces(*texts: str, error: Exception | None = None) -> AsyncGenerator[BaseModel]:
    for text in texts:
        yield Piece(text=text)
    if error is not None:
        raise error


def test_events_end_with_done() -> None:
    assert collect(Piece(text="a"), pieces("b")) == ['data: {"text":"a"}\n\n', 'data: {"text":"b"}\n\n', DONE]


@pytest.mark.parametrize(("error", "words"), [(MemberError("b", "broke"), "broke"), (ValueError("x"), "log")])
def test_a_failure_is_an_event_and_then_done(error: Exception, words: str) -> None:
    *_, failure, done = collect(Piece(text="a"), pieces(error=error))
    assert words in json.loads(failure.removeprefix("data: "))["error"]["message"]
    assert done == DONE


@pytest.mark.parametrize("char", list("\n\r\x0b\x0c\x1c\x85\u2028\u2029"))
def test_no_text_can_break_a_line(char: str) -> None:
    text = f"a{char}b😀"
    (encoded, _) = collect(Piece(text=text), pieces())
    assert len(encoded.splitlines()) == 2
    assert json.loads(encoded.removeprefix("data: "))["text"] == text


def test_an_event_is_one_line_and_a_blank_one() -> None:
    assert event("x") == "data: x\n\n"
    assert event("x", "a.b") == "event: a.b\ndata: x\n\n"


def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        return 5

    assert asyncio.run(unless_gone(never, work())) == 5


def test_work_that_fails_raises_its_own_error() -> None:
    async def work() -> int:
        raise MemberError("a", "broke")

    with pytest.raises(MemberError):
        asyncio.run(unless_gone(never, work()))


def test_a_client_that_goes_cancels_the_work() -> None:
    ends: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    with pytest.raises(ClientGoneError):
        asyncio.run(unless_gone(at_once, work()))
    assert ends == ["cancelled"]


@pytest.mark.parametrize("broken_pipe", [False, True])
def test_a_stream_without_a_listener_closes_its_source(broken_pipe: bool) -> None:
    closed: list[str] = []

    async def endless() -> AsyncGenerator[BaseModel]:
        try:
            while True:
                await asyncio.sleep(0)
                yield Piece(text="x")
        finally:
            closed.append("closed")

    async def run() -> None:
        source = endless()
        first = asyncio.create_task(streams._next(source))
        num_sent = 0

        async def receive() -> Message:
            while broken_pipe or num_sent < 5:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(_message: Message) -> None:
            nonlocal num_sent
            num_sent += 1
            if broken_pipe and num_sent == 5:
                raise OSError("broken pipe")

        await EventStream(first, source, {}, Wire())({"type": "http"}, receive, send)

    asyncio.run(run())
    assert closed == ["closed"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(streams, "KEEPALIVE_SECONDS", 0.1)


async def late(seconds: float, error: Exception | None = None) -> AsyncGenerator[BaseModel]:
    await asyncio.sleep(seconds)
    if error is not None:
        raise error
    yield Piece(text="a")
    await asyncio.sleep(seconds)
    yield Piece(text="b")


async def sent(chunks: AsyncGenerator[BaseModel]) -> list[Message]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    response = await begin(chunks, never, lambda: {"X-Served-By": "a"}, Wire())
    await response({"type": "http"}, never, send)
    return messages


@pytest.mark.usefixtures("hasty")
def test_a_stream_that_keeps_us_waiting_begins_without_its_first_chunk() -> None:
    messages = asyncio.run(sent(late(0.35)))
    bodies = [message["body"] for message in messages[1:]]
    assert bodies[0] == bodies[1] == b": keepalive\n\n"
    data = [body for body in bodies if body.startswith(b"data")]
    assert data == [b'data: {"text":"a"}\n\n', b'data: {"text":"b"}\n\n', DONE.encode()]
    assert bodies[-1] == b"", "nothing comes after the end"
    assert (b"x-served-by", b"a") in messages[0]["headers"]


@pytest.mark.usefixtures("hasty")
def test_an_early_error_sets_the_status_and_a_late_one_is_an_event() -> None:
    with pytest.raises(MemberError):
        asyncio.run(sent(late(0.0, MemberError("a", "broke"))))
    messages = asyncio.run(sent(late(0.2, MemberError("a", "broke"))))
    assert messages[0]["status"] == 200
    assert any(b"broke" in message.get("body", b"") for message in messages)
    assert messages[-2]["body"] == DONE.encode()


async def silent(closed: list[str]) -> AsyncGenerator[BaseModel]:
    """Chunks that never come; closed: tells when it was closed."""
    try:
        await asyncio.Event().wait()
        yield Piece(text="a")
    finally:
        closed.append("closed")


def test_a_client_that_goes_before_the_first_chunk_ends_the_work() -> None:
    closed: list[str] = []
    with pytest.raises(ClientGoneError):
        asyncio.run(begin(silent(closed), at_once, dict, Wire()))
    assert closed == ["closed"]


@pytest.mark.usefixtures("hasty")
def test_a_client_that_goes_while_nothing_comes_ends_the_work() -> None:
    closed: list[str] = []

    async def run() -> None:
        gone = asyncio.Event()

        async def receive() -> Message:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_message: Message) -> None:
            asyncio.get_running_loop().call_later(0.05, gone.set)

        response = await begin(silent(closed), receive, dict, Wire())
        await response({"type": "http"}, receive, send)

    asyncio.run(run())
    assert closed == ["closed"]

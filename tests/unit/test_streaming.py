"""Streams of outputs: bounds on time and on what a slow reader leaves unread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from ensemble_core import streaming
from ensemble_core.decoding.requests import Output
from ensemble_core.errors import RequestTimeoutError, SlowReaderError
from ensemble_core.streaming import OutputStream, rough_size

PIECE = Output("word", (1,), 1, 1)
LAST = Output("", (2,), 1, 2, "stop")


def stream(aborted: list[int], **bounds: float) -> OutputStream:
    made = OutputStream(aborted.extend, **bounds)
    made.follow([7, 9])
    return made


def awaited(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(test(*args, **fixtures))

    return run


@awaited
async def test_outputs_come_in_order_until_all_have_ended() -> None:
    aborted: list[int] = []
    made = stream(aborted)
    for index, output in [(0, PIECE), (1, LAST), (0, LAST)]:
        made.put(index, output)
    assert [index async for index, _ in made] == [0, 1, 0]
    await made.aclose()
    assert aborted == []


@awaited
async def test_closing_aborts_what_has_not_ended() -> None:
    aborted: list[int] = []
    made = stream(aborted)
    made.put(0, LAST)
    assert await anext(made) == (0, LAST)
    await made.aclose()
    await made.aclose()
    assert aborted == [9]


@awaited
async def test_a_request_that_takes_too_long_is_aborted() -> None:
    aborted: list[int] = []
    made = stream(aborted, seconds=0.05)
    made.put(0, PIECE)
    await anext(made)
    with pytest.raises(RequestTimeoutError, match="request_seconds"):
        await anext(made)
    assert aborted == [7, 9]


@awaited
async def test_a_reader_that_stops_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_STALLED_SECONDS", 0.05)
    aborted: list[int] = []
    made = stream(aborted, max_bytes=2 * rough_size(PIECE))
    for _ in range(50):
        made.put(0, PIECE)
    assert aborted == [], "a burst alone is no reason"
    await asyncio.sleep(0.1)
    made.put(0, PIECE)
    assert aborted == [7, 9]
    with pytest.raises(SlowReaderError, match="stream_buffer"):
        await anext(made)


@awaited
async def test_a_slow_reader_that_keeps_reading_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_STALLED_SECONDS", 0.05)
    aborted: list[int] = []
    made = stream(aborted, max_bytes=2 * rough_size(PIECE))
    for _ in range(50):
        made.put(0, PIECE)
    for _ in range(5):
        await asyncio.sleep(0.03)
        await anext(made)
        made.put(0, PIECE)
    assert aborted == []

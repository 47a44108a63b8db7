"""From the event loop's thread to others, and back: what a thread has found out is told where somebody waits for it.

A loop that has closed has no listener left, so nothing is told. Does not know what is done.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from ensemble_core.members.threads import Allotment, threads

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


def call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """Run a function in an event loop, from another thread."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        logger.debug("an event loop closed before what it waited for was done")


def settle(future: asyncio.Future[Found], found: Found) -> None:
    """A future's result, unless nobody waits any more; in the event loop's thread."""
    if not future.done():
        future.set_result(found)


def fail(future: asyncio.Future[Found], error: BaseException) -> None:
    """The same for an error."""
    if not future.done():
        future.set_exception(error)


async def aside(work: Callable[[], Found]) -> Found:
    """In a thread of its own, whose operations take one core; nobody waits for it when the process ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Found] = loop.create_future()

    def on_one_core() -> None:
        try:
            with threads(Allotment(1)):
                found = work()
        except BaseException as error:
            call(loop, fail, done, error)
        else:
            call(loop, settle, done, found)

    threading.Thread(target=on_one_core, name="change", daemon=True).start()
    return await done

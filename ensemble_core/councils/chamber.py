"""Where councils meet: takes requests, keeps places for their calls, and runs a deliberation for each choice.

Invariants: the places that a request's calls need at the same time are taken when it is admitted, so no call is
refused for a full queue; closing its stream ends every call. Does not know how a council comes to an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ensemble_core.council_config import CouncilLimits
from ensemble_core.councils.book import Council, CouncilBook
from ensemble_core.councils.deliberation import Deliberation, Hall, Ledger
from ensemble_core.councils.door import EngineDoor, Places
from ensemble_core.councils.terms import agreed, check
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.errors import UnisonoError
from ensemble_core.stats import Record
from ensemble_core.streaming import OutputStream

logger = logging.getLogger(__name__)


class Chamber:
    """Where councils meet."""

    def __init__(self, book: CouncilBook, door: EngineDoor, record: Record) -> None:
        self._hall = Hall(book, door, record)

    def __contains__(self, model: str) -> bool:
        return model in self._hall.book

    def speakers(self, model: str) -> set[str]:
        """See `CouncilBook.speakers`."""
        return self._hall.book.speakers(model)

    async def submit(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        """As `Runtime.submit`, for requests to one council.

        Raises InvalidRequestError, QueueFullError or NotReadyError before any output; later errors come from the
        stream.
        """
        council = self._hall.book[requests[0].model]
        limits = agreed(council, requests)
        for request in requests:
            check(request, council)
        places = await self._hall.door.reserve(council.name, council.cost.width * len(requests))
        meeting = _Meeting(self._hall, council, places)
        return meeting.begin(requests, limits)


class _Meeting:
    """The choices of one submission at work."""

    def __init__(self, hall: Hall, council: Council, places: Places) -> None:
        self._hall, self._council, self._places = hall, council, places
        self._tasks: list[asyncio.Task[None]] = []
        self._stream: OutputStream

    def begin(self, requests: Sequence[GenerationRequest], limits: CouncilLimits) -> OutputStream:
        self._stream = self._hall.door.stream(self._abort)
        self._stream.follow(list(range(len(requests))))
        deadline = time.perf_counter() + limits.seconds
        self._tasks = [
            asyncio.create_task(self._choice(index, request, limits, deadline))
            for index, request in enumerate(requests)
        ]
        self._closing = asyncio.create_task(self._close())
        return self._stream

    def _abort(self, indices: list[int]) -> None:
        for index in indices:
            self._tasks[index].cancel()

    async def _close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._places.release()

    async def _choice(
        self, index: int, request: GenerationRequest, limits: CouncilLimits, deadline: float
    ) -> None:
        """One choice from its first call to its last output. An error ends the whole stream."""
        ledger = Ledger()
        run = Deliberation(self._hall, self._council, limits, deadline, ledger)
        try:
            await run.answer(request, lambda output: self._stream.put(index, output))
        except UnisonoError as error:
            self._stream.fail(error)
        except Exception as error:
            logger.exception("the council %s failed", self._council.name)
            self._stream.fail(error)

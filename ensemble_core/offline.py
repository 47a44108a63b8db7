"""Councils without a server: their calls go to an engine that this thread steps.

Everything runs in one event loop of the caller's: between the steps of the engine the councils read their answers and
make their next calls, so the calls of many questions are batched. Not thread-safe. Does not know prompts' files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from ensemble_core.admission import Admission
from ensemble_core.councils.book import CouncilBook
from ensemble_core.councils.chamber import Chamber
from ensemble_core.councils.door import EngineDoor
from ensemble_core.decoding.requests import GenerationRequest, Output, Prompt, join
from ensemble_core.engine import Engine
from ensemble_core.stats import Record
from ensemble_core.streaming import OutputStream


@dataclass(frozen=True, slots=True)
class Unbounded:
    """Places where nobody else waits."""

    def release(self) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class OfflineCouncils:
    """Councils over an engine of this thread."""

    engine: Engine
    admission: Admission
    book: CouncilBook
    record: Record
    _streams: dict[int, tuple[OutputStream, int]] = field(default_factory=dict)  # seq_id -> stream, position

    def answers(self, requests: Sequence[GenerationRequest], most_calls: int) -> list[Output]:
        """The joined answer to each request, in their order. most_calls: that may run at the same time, about.

        Raises the first error that ends a request.
        """
        return asyncio.run(self._answers(requests, most_calls))

    async def _answers(self, requests: Sequence[GenerationRequest], most_calls: int) -> list[Output]:
        door = EngineDoor(self._submit, self._room, self._reserve, OutputStream)
        chamber = Chamber(self.book, door, self.record)
        width = max(self.book[request.model].cost.width for request in requests)
        places = asyncio.Semaphore(max(most_calls // width, 1))

        async def answer(request: GenerationRequest) -> Output:
            async with places:
                stream = await chamber.submit([request])
                return join([output async for _, output in stream])

        tasks = [asyncio.create_task(answer(request)) for request in requests]
        stepping = asyncio.create_task(self._step_on())
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in (*tasks, stepping):
                task.cancel()
            await asyncio.gather(*tasks, stepping, return_exceptions=True)
            self.engine.abort(list(self._streams))
            self._streams.clear()

    async def _step_on(self) -> None:
        while True:
            if self.engine.has_work:
                for seq_id, output in self.engine.step():
                    self._hand_on(seq_id, output)
            await asyncio.sleep(0 if self.engine.has_work else 0.001)

    def _hand_on(self, seq_id: int, output: Output) -> None:
        if seq_id in self._streams:
            stream, position = self._streams[seq_id]
            stream.put(position, output)
            if output.finish_reason is not None:
                del self._streams[seq_id]

    async def _submit(self, requests: Sequence[GenerationRequest]) -> OutputStream:
        sequences = self.admission.admit_all(requests)
        stream = OutputStream(self._abort)
        stream.follow([sequence.seq_id for sequence in sequences])
        self.engine.add(sequences)
        self._streams.update((each.seq_id, (stream, rank)) for rank, each in enumerate(sequences))
        return stream

    def _abort(self, seq_ids: list[int]) -> None:
        self.engine.abort(seq_ids)
        for seq_id in seq_ids:
            self._streams.pop(seq_id, None)

    async def _room(self, model: str, prompt: Prompt) -> int:
        ids, main = self.admission.tokenize(model, prompt, add_special_tokens=True)
        return main.max_len - len(ids)

    async def _reserve(self, _model: str, _places: int) -> Unbounded:
        return Unbounded()

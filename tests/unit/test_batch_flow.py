"""Requests in flight: bounded, in order, never lost; refusals wait; stops and drops leave no half results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from server.batches.flow import FlightWindow, Flow
from server.batches.lines import BatchItem, LineFault
from server.batches.results import BatchReply, LineResult


@dataclass
class FakeEndpoint:
    """Answers each request after some turns of the loop; refuses those that come while `room` are at work."""

    room: int = 10**9
    turns: Callable[[int], int] = lambda line: 2
    status: Callable[[int], int] = lambda line: 200
    gate: asyncio.Event | None = None
    begun: list[int] = field(default_factory=list)
    running: int = 0
    most: int = 0
    refused: int = 0

    async def __call__(self, item: BatchItem) -> BatchReply:
        if self.running >= self.room:
            self.refused += 1
            return BatchReply(429, "r", {})
        self.begun.append(item.line)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
            for _ in range(self.turns(item.line)):
                await asyncio.sleep(0)
            return BatchReply(self.status(item.line), "r", {"usage": {"prompt_tokens": 2, "completion_tokens": 3}})
        finally:
            self.running -= 1


@dataclass
class Lines:
    """The lines 1 to `num`; every fifth is a fault. Counts how many were asked for."""

    num: int
    faults: bool = True
    taken: int = 0

    async def __aiter__(self) -> AsyncIterator[BatchItem | LineFault]:
        for line in range(1, self.num + 1):
            self.taken = line
            if self.faults and line % 5 == 0:
                yield LineFault(line, "bad", "bad")
            else:
                yield BatchItem(line, f"c{line}", "/u", b"{}")


def made(endpoint: FakeEndpoint, places: int, results: list[LineResult], patience: float = 5.0) -> Flow:
    return Flow(endpoint, lambda: None, results.append, FlightWindow(places, patience))


def test_every_line_has_one_result_and_requests_begin_in_order() -> None:
    endpoint, results = FakeEndpoint(turns=lambda line: line * 7 % 5), list[LineResult]()
    flow = made(endpoint, 4, results)
    assert asyncio.run(flow.run(aiter(Lines(100))))
    assert endpoint.begun == [line for line in range(1, 101) if line % 5]
    assert sorted(each.custom_id for each in results if each.custom_id) == sorted(f"c{n}" for n in endpoint.begun)
    assert len(results) == 100
    assert endpoint.most == 4
    counts = flow.counts
    assert (counts.completed, counts.failed, counts.prompt_tokens, counts.completion_tokens) == (80, 20, 160, 240)


def test_no_more_lines_are_read_than_requests_can_run() -> None:
    async def run() -> None:
        endpoint, lines = FakeEndpoint(gate=asyncio.Event()), Lines(10_000, faults=False)
        flow = made(endpoint, 8, [])
        running = asyncio.create_task(flow.run(aiter(lines)))
        for _ in range(200):
            await asyncio.sleep(0)
        assert (endpoint.running, lines.taken) == (8, 9)
        flow.drop()
        await running

    asyncio.run(run())


def test_a_refusal_is_never_a_result_and_goes_before_new_requests() -> None:
    endpoint, results = FakeEndpoint(room=3, turns=lambda line: 3 + line % 4), list[LineResult]()
    flow = made(endpoint, 6, results)
    asyncio.run(asyncio.wait_for(flow.run(aiter(Lines(60, faults=False))), 5))
    assert len(results) == 60
    assert all(each.is_answer for each in results)
    assert endpoint.refused > 0
    late = [place - rank for rank, place in enumerate(line - 1 for line in endpoint.begun)]
    assert max(map(abs, late)) <= 6  # as far as requests in flight may overtake each other


def test_a_refusal_waits_for_others_too_who_are_not_in_the_batch() -> None:
    async def run() -> None:
        endpoint, results = FakeEndpoint(room=0), list[LineResult]()
        flow = made(endpoint, 2, results, patience=0.01)
        running = asyncio.create_task(flow.run(aiter(Lines(4, faults=False))))
        await asyncio.sleep(0.1)
        assert results == []
        endpoint.room = 1
        assert await running
        assert [each.is_answer for each in results] == [True] * 4

    asyncio.run(run())


@pytest.mark.parametrize("drop", [False, True])
def test_a_stop_begins_no_more_and_a_drop_ends_what_runs(drop: bool) -> None:
    async def run() -> None:
        endpoint, results, lines = FakeEndpoint(gate=asyncio.Event()), list[LineResult](), Lines(100, faults=False)
        flow = made(endpoint, 8, results)
        running = asyncio.create_task(flow.run(aiter(lines)))
        await asyncio.sleep(0.01)
        flow.stop()
        assert flow.num_running == 8
        if drop:
            flow.drop()
        else:
            assert endpoint.gate is not None
            endpoint.gate.set()
        assert not await running
        assert len(results) == (0 if drop else 8)
        assert endpoint.begun == list(range(1, 9))
        assert endpoint.running == 0

    asyncio.run(run())


def test_other_failures_are_results() -> None:
    results = list[LineResult]()
    flow = made(FakeEndpoint(status=lambda line: {1: 500, 2: 400, 3: 503}.get(line, 200)), 2, results)
    assert asyncio.run(flow.run(aiter(Lines(4, faults=False))))
    assert (flow.counts.completed, flow.counts.failed) == (1, 3)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_dead_engine_ends_the_run_and_writes_none_of_its_failures(status: int) -> None:
    results = list[LineResult]()
    endpoint = FakeEndpoint(status=lambda line: 200 if line < 3 else status)
    flow = made(endpoint, 1, results)
    flow.gone = lambda: "the engine is dead"
    assert not asyncio.run(flow.run(aiter(Lines(1000, faults=False))))
    assert flow.failure == "the engine is dead"
    assert [each.custom_id for each in results] == ["c1", "c2"]
    assert len(endpoint.begun) == 3


def test_a_full_disk_ends_the_run() -> None:
    def deliver(result: LineResult) -> None:
        raise OSError(28, "No space left on device")

    flow = Flow(FakeEndpoint(), lambda: None, deliver, FlightWindow(2))
    assert not asyncio.run(flow.run(aiter(Lines(1000, faults=False))))
    assert flow.failure == "a result cannot be written (No space left on device)"
    assert flow.counts.completed == 0

"""The parts of the benchmarks that can be wrong without a model: statistics, schedules, the client, tables."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import prose
from benchmarks.__main__ import SPEED
from benchmarks.ledger import Check, Findings, cell, markdown, put_between, table
from benchmarks.runner import Suite, fill, main
from benchmarks.stopwatch import Spread, Timed, percentile, ratios, take_turns
from benchmarks.traffic import Call, Stream, play, replay, schedule

SAMPLES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(SAMPLES, st.floats(0, 100))
def test_a_percentile_is_numpys(samples: list[float], q: float) -> None:
    assert percentile(samples, q) == pytest.approx(float(np.percentile(samples, q)), rel=1e-9, abs=1e-9)


def test_a_percentile_needs_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([1.0, 2.0, 3.0]).scaled(10) == Spread(20.0, 15.0, 25.0, 3)


def test_ratios_are_taken_turn_by_turn() -> None:
    """A disturbance of both sides of a turn leaves the ratio alone."""
    assert ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 2.0, 3)


def test_contestants_take_turns_and_preparation_is_not_timed() -> None:
    order: list[str] = []

    def note(name: str, seconds: float = 0.0) -> Callable[[], None]:
        return lambda: (order.append(name), time.sleep(seconds))[0]

    seconds = take_turns({"a": note("a"), "b": Timed(note("b"), note("prepare", 0.02))}, rounds=3, warmup=1)
    assert order == ["a", "prepare", "b"] * 4
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert max(seconds["b"]) < 0.02


def test_a_schedule_keeps_its_rate_and_its_seed() -> None:
    moments = schedule(rate=50.0, seconds=100.0, seed=3)
    assert moments == sorted(moments)
    assert 0 < moments[0] <= moments[-1] < 100
    assert len(moments) == pytest.approx(5000, abs=4 * math.sqrt(5000))
    assert moments == schedule(50.0, 100.0, 3) != schedule(50.0, 100.0, 4)


def test_gaps_are_those_that_touch_the_window() -> None:
    stream = Stream(due=9.0, arrivals=[10.0, 11.0, 13.0, 16.0])
    assert stream.ttft == 1.0
    assert stream.gaps() == [1.0, 2.0, 3.0]
    assert stream.gaps(11.5, 12.0) == [2.0]
    assert stream.gaps(12.0, 14.0) == [2.0, 3.0]
    assert stream.gaps(16.0) == []


@asynccontextmanager
async def scripted_server(
    wait: float, num_tokens: int, status: int = 200
) -> AsyncIterator[tuple[str, list[float]]]:
    """An HTTP server that streams `num_tokens` counts `wait` seconds after each request; when requests came."""
    came: list[float] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(next(line for line in head.splitlines() if line.startswith("content-length")).split(":")[1])
        assert json.loads(await reader.readexactly(size))["ignore_eos"] is True
        came.append(time.perf_counter())
        await asyncio.sleep(wait)
        writer.write(f"HTTP/1.1 {status} X\r\nConnection: close\r\n\r\n".encode())
        for count in [*range(1, num_tokens + 1), num_tokens]:
            usage = {"completion_tokens": count, "prompt_tokens": 3}
            writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", came


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def run() -> tuple[list[Stream], list[float]]:
        async with scripted_server(wait=0.6, num_tokens=2) as (url, came):
            return await play(url, [Call("m", [1, 2, 3], 2, after) for after in (0.0, 0.1, 0.2)]), came

    streams, came = asyncio.run(run())
    assert [stream.num_tokens for stream in streams] == [2, 2, 2]
    assert [len(stream.arrivals) for stream in streams] == [2, 2, 2]  # the last chunk told of nothing new
    assert max(came) < min(stream.arrivals[0] for stream in streams)
    assert all(stream.ttft >= 0.6 for stream in streams)


def test_a_closed_loop_waits_for_answers() -> None:
    async def run() -> tuple[list[Stream], list[float]]:
        async with scripted_server(wait=0.1, num_tokens=1) as (url, came):
            return await replay(url, [[Call("m", "x", 1)] * 2]), came

    streams, came = asyncio.run(run())
    assert came[1] > streams[0].arrivals[0]


@pytest.mark.parametrize(("asked", "status", "words"), [(3, 200, "2 tokens where 3"), (2, 429, "answered 429")])
def test_a_stream_that_is_not_whole_is_an_error(asked: int, status: int, words: str) -> None:
    async def run() -> None:
        async with scripted_server(wait=0.0, num_tokens=2, status=status) as (url, _):
            await play(url, [Call("m", "x", asked)])

    with pytest.raises(RuntimeError, match=words):
        asyncio.run(run())


def test_a_check_compares_in_its_sense_and_refuses_nan() -> None:
    assert Check("x", 1.0, "<=", 1.0).met
    assert not Check("x", 1.01, "<=", 1.0).met
    assert Check("x", 9.0, ">=", 9.0).met
    assert not Check("x", 8.9, ">=", 9.0).met
    assert not Check("x", math.nan, "<=", 1.0).met


def test_cells_show_the_digits_that_matter() -> None:
    assert [cell(v) for v in (1.0249, 25.04, 204.8, 0.009, 3, "x", None)] == [
        "1.025",
        "25.0",
        "204.8",
        "0.009",
        "3",
        "x",
        "-",
    ]


ROWS = [{"name": "a", "ms": 1.5, "B": 1}, {"name": "longer", "ms": 12.25, "B": 32}]


def test_tables_align_text_left_and_numbers_right() -> None:
    assert table(ROWS).splitlines() == ["name       ms   B", "a       1.500   1", "longer   12.2  32"]
    assert markdown(ROWS).splitlines()[1:3] == ["| --- | --- | --- |", "| a | 1.500 | 1 |"]


def test_the_last_line_of_a_report_is_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    Findings("demo", {"first": ROWS}, [Check("ratio", 2.0, "<=", 1.0)], {"rounds": 3}).print()
    *above, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    assert record["tables"] == {"first": ROWS}
    assert record["checks"] == [{"what": "ratio", "figure": 2.0, "sense": "<=", "bound": 1.0, "met": False}]
    assert {"cpu", "cores", "threads", "date", "torch", "commit"} <= set(record["machine"])
    assert any("NOT MET" in line for line in above)


def test_tables_go_between_their_marks_again_and_again() -> None:
    text = "above\n<!-- begin x -->\nold\n<!-- end x -->\nbelow"
    once = put_between(text, "x", "new")
    assert once == "above\n<!-- begin x -->\nnew\n<!-- end x -->\nbelow"
    assert put_between(once, "x", "new") == once
    with pytest.raises(ValueError, match="begin y"):
        put_between(text, "y", "new")


def test_the_document_has_a_place_for_every_benchmark() -> None:
    record = Findings("demo", {"first": ROWS}, [Check("ratio", 2.0, "<=", 1.0)], {"rounds": 3}).record()
    text = fill(SPEED.page.read_text(), dict.fromkeys(SPEED.names, record))
    assert text.count("| longer | 12.2 | 32 |") == len(SPEED.names)
    assert text.count("| ratio | 2.000 | <= 1.000 | NOT MET |") == len(SPEED.names)


def test_prompts_of_other_seeds_differ_from_the_start() -> None:
    assert prose.sentences(1, 3) == prose.sentences(1, 3)
    assert len({prose.sentences(seed, 1) for seed in range(64)}) > 60

"""The parts of the benchmarks that can be wrong without a model: statistics, schedules, the client, tables."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import batches, prose, workloads
from benchmarks.__main__ import SPEED
from benchmarks.costs import PARTS, Cost, checks_of, measure
from benchmarks.costs import row as cost_row
from benchmarks.ledger import Check, Findings, Value, cell, markdown, put_between, table
from benchmarks.paired import compare
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


def test_streams_beside_a_batch_are_compared_turn_by_turn() -> None:
    calm = [dict.fromkeys(batches.FIGURES, each) for each in (10.0, 100.0, 20.0)]
    beside = [dict.fromkeys(batches.FIGURES, each) for each in (30.0, 200.0, 20.0)]
    assert batches.row("alone", calm) == {"streams": "alone", **dict.fromkeys(batches.FIGURES, 20.0)}
    assert batches.ratio(calm, beside) == {"streams": "beside / alone", **dict.fromkeys(batches.FIGURES, 2.0)}


def test_a_line_of_a_batch_is_the_call_without_its_stream() -> None:
    line = batches._line(3, Call("m", [1, 2], 7))
    body = line["body"]
    assert isinstance(body, dict)
    assert (line["custom_id"], line["url"]) == ("3", "/v1/completions")
    assert (body["prompt"], body["max_tokens"], body["min_tokens"]) == ([1, 2], 7, 7)
    assert not any(name.startswith("stream") for name in body)


def record_of(*rows: dict[str, Value]) -> dict[str, Any]:
    return Findings("demo", {"steps": rows}).record()


def test_paired_figures_are_compared_round_by_round() -> None:
    """Both rounds doubled in one figure and halved in the other, however slow the machine was in each."""
    base = [
        record_of(
            {"load": "open", "requests": 22, "ms": ms, "tokens/s": 8.0, "note": "x", "none": None, "zero": 0.0}
        )
        for ms in (1.0, 10.0)
    ]
    now = [
        record_of({"load": "open", "requests": 23, "ms": ms, "tokens/s": 4.0, "new": 1.0}) for ms in (2.0, 20.0)
    ]
    tables = compare(base, now)
    assert tables["figures"] == [
        {
            "row": "open, requests 22",
            "figure": "ms",
            "base": 5.5,
            "now": 11.0,
            "ratio": 2.0,
            "over rounds": "2.000 .. 2.000",
        },
        {
            "row": "open, requests 22",
            "figure": "tokens/s",
            "base": 8.0,
            "now": 4.0,
            "ratio": 0.5,
            "over rounds": "0.500 .. 0.500",
        },
    ]


def test_a_column_of_paired_figures_has_its_geometric_mean() -> None:
    base, now = (
        record_of({"B": 1, "ms": 1.0}, {"B": 8, "ms": 1.0}),
        record_of({"B": 1, "ms": 4.0}, {"B": 8, "ms": 1.0}),
    )
    (column,) = compare([base], [now])["columns"]
    assert (column["figure"], column["rows"], column["mean ratio"]) == ("ms", 2, pytest.approx(2.0))


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A folder with a command that works and one that fails, and a document with places for their tables."""
    package, page = tmp_path / "toys", tmp_path / "toys.md"
    package.mkdir()
    record = json.dumps(Findings("works", {"first": ROWS}, [Check("ratio", 2.0, "<=", 1.0)]).record())
    (package / "works.py").write_text(f"import sys\nprint('options', *sys.argv[1:])\nprint({record!r})\n")
    (package / "fails.py").write_text(f"print({record!r})\nraise SystemExit(1)\n")
    page.write_text(
        "".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in ("works", "fails", "bounds"))
    )
    monkeypatch.setattr("benchmarks.ledger.ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.runner.ROOT", tmp_path)
    return Suite("toys", ("works", "fails"), page)


def call(suite: Suite, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", [suite.package, *options])
    main(suite)


def test_a_suite_keeps_results_and_fills_its_document(
    toys: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(toys, monkeypatch, "works", "--document")
    assert json.loads((tmp_path / "toys/results/works.json").read_text())["tables"] == {"first": ROWS}
    assert "| longer | 12.2 | 32 |" in toys.page.read_text()
    assert "| ratio | 2.000 | <= 1.000 | NOT MET |" in toys.page.read_text()
    assert "options\n" in capsys.readouterr().out


def test_quick_results_are_kept_apart(
    toys: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(toys, monkeypatch, "works", "--quick")
    assert [path.relative_to(tmp_path / "toys") for path in tmp_path.glob("toys/results/**/*.json")] == [
        Path("results/quick/works.json")
    ]
    assert "options --quick" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(toys, monkeypatch, "works", "--quick", "--document")


def test_a_command_that_fails_is_named_and_keeps_nothing(
    toys: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="failed: fails"):
        call(toys, monkeypatch)
    assert [path.name for path in tmp_path.glob("toys/results/*.json")] == ["works.json"]
    with pytest.raises(SystemExit):
        call(toys, monkeypatch, "unknown")


def test_a_cost_is_held_against_its_bound_its_base_and_its_growth() -> None:
    cost = Cost(
        "x", "tokens", (10, 20, 40, 80), lambda size: lambda: float(size), 1.5, lambda _: lambda: 40.0, 2.0
    )
    found = measure(cost, cost.sizes, rounds=3)
    assert found == {"10": 10.0, "20": 20.0, "40": 40.0, "80": 80.0, "base": 40.0}
    over_base, growth = checks_of(cost, cost.sizes, found)
    assert (over_base.figure, over_base.bound, over_base.met) == (2.0, 1.5, False)
    assert (growth.figure, growth.bound, growth.met) == (8.0, 2.0, False)
    shown = cost_row(cost, cost.sizes, found, {"whole ms": 160.0, "base ms": None})
    assert (shown["1/8 ms"], shown["whole ms"], shown["before, whole ms"]) == (10.0, 80.0, 160.0)
    assert shown["must"] == "<= 1.5 x base, <= 2 x that of 10"


def test_a_cost_of_three_sizes_has_no_eighth() -> None:
    cost = Cost("x", "members", (2, 4, 8), lambda size: lambda: float(size), 5.0)
    shown = cost_row(cost, cost.sizes, measure(cost, cost.sizes, rounds=1), None)
    assert [shown[f"{part} ms"] for part in PARTS] == [None, 2.0, 4.0, 8.0]
    (check,) = checks_of(cost, cost.sizes, {"2": 2.0, "4": 4.0, "8": 8.0})
    assert not check.met


def test_texts_of_the_spelling_costs_have_no_spaces() -> None:
    for write in (workloads.chinese, workloads.minified_json):
        text = write(3000)
        assert len(text) == 3000
        assert not set(text) & set(" \n\t")
        assert write(1000) == text[:1000]


@pytest.mark.parametrize(
    "sample",
    [
        lambda: workloads.prefix_search(3, 32),
        lambda: workloads.admit(4),
        lambda: workloads.candidates(1024, constrained=True),
        lambda: workloads.penalties(16),
        lambda: workloads.stop_strings(32, nearly=False),
        lambda: workloads.stop_strings(32, nearly=True),
        lambda: workloads.fusion("projection", 2),
        lambda: workloads.fusion("union", 3),
    ],
)
def test_every_kind_of_work_can_be_done_again_and_again(sample: Callable[[], workloads.Sample]) -> None:
    work = sample()
    assert all(math.isfinite(work()) for _ in range(3))


def test_a_search_for_prefixes_finds_its_kept_ones() -> None:
    """What is measured is a search among 24 kept prefixes per member, by prompts that are all untouched."""
    crowd = workloads.Crowd(3, 32, prefix_reuse=True)
    crowd.step()
    engine = crowd.engine
    assert [sum(t.num_cached for t in s.tracks.values()) for s in engine.scheduler.running] == [4, 0, 0]
    for member in engine.members.values():
        assert member.reuse(99, workloads.ids_of(0, 32)) == 32  # the first kept prefix is there


def test_prompts_of_other_seeds_differ_from_the_start() -> None:
    assert prose.sentences(1, 3) == prose.sentences(1, 3)
    assert len({prose.sentences(seed, 1) for seed in range(64)}) > 60

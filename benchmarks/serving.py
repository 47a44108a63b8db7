"""Throughput and latency of a server process, through HTTP streams.

    python -m benchmarks.serving [--config configs/demo.yaml] [--quick]

closed N   N clients that send a request each at the same moment
open N %   requests that leave at random moments (Poisson), at N % of the token rate of the largest closed set,
           whether or not earlier ones are answered; latency counts from the moment a request was due
beside     streams that run while another stream's prompt of 1,000 tokens is read: their gaps in that time, against
           the median gap of the same streams before it

Prompts differ, have 64 tokens, and each answer has exactly 256 (checked). Tokens are the main member's. Milliseconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from benchmarks import prose
from benchmarks.ledger import Check, Findings, TableRow, Value, arguments
from benchmarks.stopwatch import percentile
from benchmarks.traffic import Call, Stream, client, follow, play, replay, schedule, send, serving
from ensemble_core.config_file import load_config
from ensemble_core.members.loading.checkpoints import load_tokenizer

THROUGHPUT_BOUND = 9.0
BESIDE_BOUND = 3.0
LOADS = (0.5, 0.8)  # of the closed set's token rate
LONG_PROMPT = 1000
ENDLESS = 1500  # tokens of a stream that is hung up on
SETTLING = 3  # first tokens of streams that start together, which do not count
PAUSE = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How much to send."""

    closed: Sequence[int] = (1, 4, 16, 32)
    prompt_tokens: int = 64
    answer_tokens: int = 256
    open_seconds: float = 40.0
    beside: Sequence[int] = (1, 8, 16)
    long_prompts: int = 3

    def quick(self) -> LoadPlan:
        """To see that it runs."""
        return replace(
            self,
            closed=(1, 4),
            prompt_tokens=16,
            answer_tokens=16,
            open_seconds=4.0,
            beside=(2,),
            long_prompts=1,
        )


class Prompts:
    """Calls with prompts that were not sent before."""

    def __init__(self, model: str, tokenizer: Any) -> None:
        self._model, self._tokenizer, self._num = model, tokenizer, 0

    def call(self, length: int, num_tokens: int, after: float = 0.0) -> Call:
        """A new one, with `length` prompt tokens."""
        self._num += 1
        return Call(self._model, prose.token_ids(self._tokenizer, self._num, length), num_tokens, after)


def summarise(load: str, streams: Sequence[Stream]) -> dict[str, Value]:
    """One row of the table."""
    begin, end = min(s.due for s in streams), max(s.arrivals[-1] for s in streams)
    ttft = [1e3 * stream.ttft for stream in streams]
    gaps = [1e3 * gap for stream in streams for gap in stream.gaps()]
    return {
        "load": load,
        "requests": len(streams),
        "tokens/s": sum(stream.num_tokens for stream in streams) / (end - begin),
        "TTFT p50": percentile(ttft, 50),
        "TTFT p99": percentile(ttft, 99),
        "inter-token p50": percentile(gaps, 50),
        "inter-token p99": percentile(gaps, 99),
    }


def closed_sets(url: str, prompts: Prompts, plan: LoadPlan) -> list[dict[str, Value]]:
    """A row for every number of concurrent streams."""
    rows = []
    for num in plan.closed:
        lines = [[prompts.call(plan.prompt_tokens, plan.answer_tokens)] for _ in range(num)]
        rows.append(summarise(f"closed {num}", asyncio.run(replay(url, lines, f"closed {num}"))))
    return rows


def open_loads(url: str, prompts: Prompts, plan: LoadPlan, tokens_a_second: float) -> list[dict[str, Value]]:
    """A row for every offered load."""
    rows = []
    for load in LOADS:
        moments = schedule(load * tokens_a_second / plan.answer_tokens, plan.open_seconds, seed=1) or [0.0]
        calls = [prompts.call(plan.prompt_tokens, plan.answer_tokens, after) for after in moments]
        title = f"open {load:.0%}"
        rows.append(summarise(title, asyncio.run(play(url, calls, title))))
    return rows


@dataclass(frozen=True, slots=True)
class Beside:
    """What running streams saw of one long prompt; seconds."""

    calm: list[float]  # gaps before it
    disturbed: list[float]  # gaps from when it was sent until its first token
    ttft: float


async def beside_a_prompt(url: str, prompts: Prompts, plan: LoadPlan, num: int) -> Beside:
    """Let `num` streams run, send a long prompt, and hang up when it has its first tokens."""
    async with client(url) as session:
        running = [Stream(time.perf_counter()) for _ in range(num)]
        calls = [prompts.call(plan.prompt_tokens, ENDLESS) for _ in running]
        tasks = [asyncio.create_task(follow(session, c, s)) for c, s in zip(calls, running, strict=True)]
        try:
            begun = await _all_have(running, SETTLING, tasks)
            await _all_have(running, SETTLING + 16 + max(len(s.arrivals) for s in running), tasks)
            long = await send(session, prompts.call(LONG_PROMPT, 2), time.perf_counter())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(PAUSE)  # until the server has seen that they are gone
    calm = [gap for stream in running for gap in stream.gaps(begun, long.due)]
    disturbed = [gap for stream in running for gap in stream.gaps(long.due, long.arrivals[0])]
    return Beside(calm, disturbed, long.ttft)


async def _all_have(streams: Sequence[Stream], num_tokens: int, tasks: Sequence[asyncio.Task[None]]) -> float:
    """When every stream has that many tokens; raises what ended one of them."""
    while min(len(stream.arrivals) for stream in streams) < num_tokens:
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError("a stream that was to run on has ended")
        await asyncio.sleep(0.005)
    return time.perf_counter()


def beside_rows(url: str, prompts: Prompts, plan: LoadPlan) -> list[dict[str, Value]]:
    """A row for every number of running streams."""
    rows = []
    for num in plan.beside:
        seen = [asyncio.run(beside_a_prompt(url, prompts, plan, num)) for _ in range(plan.long_prompts)]
        calm = 1e3 * median([gap for each in seen for gap in each.calm])
        disturbed = [1e3 * gap for each in seen for gap in each.disturbed]
        p99 = percentile(disturbed, 99)
        row: dict[str, Value] = {"running": num, "their median": calm, "gaps beside": len(disturbed)}
        row |= {"median beside": median(disturbed), "p99 beside": p99, "p99 / their median": p99 / calm}
        rows.append(row | {"TTFT of the long one": 1e3 * median([each.ttft for each in seen])})
    return rows


def checks_of(plan: LoadPlan, loads: Sequence[TableRow], beside: Sequence[TableRow]) -> list[Check]:
    """The bounds; that on throughput where both ends of it were measured."""
    rate = {row["load"]: float(str(row["tokens/s"])) for row in loads}
    checks = []
    if {1, 32} <= set(plan.closed):
        figure = rate["closed 32"] / rate["closed 1"]
        checks.append(Check("tokens/s at 32 streams / at 1 stream", figure, ">=", THROUGHPUT_BOUND))
    for row in beside:
        what = f"p99 inter-token beside a prompt of {LONG_PROMPT} tokens / their median, {row['running']} running"
        checks.append(Check(what, float(str(row["p99 / their median"])), "<=", BESIDE_BOUND))
    return checks


def main() -> None:
    """Measure the first ensemble of the configuration."""
    args = arguments(__doc__).parse_args()
    plan = LoadPlan().quick() if args.quick else LoadPlan()
    config = load_config(args.config)
    model = next(iter(config.ensembles))
    main_member = config.ensembles[model].main
    prompts = Prompts(model, load_tokenizer(main_member, config.members[main_member]))
    with serving(args.config) as url:
        asyncio.run(play(url, [prompts.call(plan.prompt_tokens, 8)]))  # warm
        loads = closed_sets(url, prompts, plan)
        loads += open_loads(url, prompts, plan, float(str(loads[-1]["tokens/s"])))
        beside = beside_rows(url, prompts, plan)
    settings = {"model": model, **asdict(plan), "quick": args.quick}
    Findings("serving", {"loads": loads, "beside": beside}, checks_of(plan, loads, beside), settings).print()


if __name__ == "__main__":
    main()

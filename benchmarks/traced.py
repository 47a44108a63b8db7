"""What traces cost: the gaps of a stream without one, while none, one or all of the streams beside it are traced.

    python -m benchmarks.traced [--config configs/demo.yaml] [--ensemble duet] [--rounds 3] [--quick]

All streams run in the same steps, so what a trace takes shows in the gaps of the stream that is watched. The three
ways run in turn, and each is compared with "none" of its own round. Times are milliseconds. That a tree without any
trace is as fast as before it had this much in them says `python -m benchmarks.paired serving --base REV`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from statistics import median

from benchmarks.in_process import in_process
from benchmarks.ledger import Check, Findings, TableRow, arguments
from benchmarks.verify import KINDS
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.runtime import Runtime

BESIDE = (1, 7)  # streams beside the one that is watched
BOUND = 1.03  # a gap beside one traced stream over one beside none
_WARM = 8  # gaps that do not count: prompts are read meanwhile


async def gap(runtime: Runtime, model: str, num_tokens: int, traced: list[bool], serial: Iterator[int]) -> float:
    """The median gap of an untraced stream. traced: of each stream beside it."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.7, ignore_eos=True, seed=1)
    requests = [
        GenerationRequest(f"r{next(serial)}", model, KINDS[rank % 5], params, trace=trace)
        for rank, trace in enumerate([False, *traced])
    ]
    gaps, last = list[float](), time.perf_counter()
    stream = await runtime.submit(requests)
    async for index, _output in stream:
        if index == 0:
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    return 1e3 * median(gaps[_WARM:])


async def rows_of(runtime: Runtime, model: str, num_tokens: int, rounds: int) -> list[TableRow]:
    """A row for each number of streams."""
    rows, serial = list[TableRow](), itertools.count()
    for beside in BESIDE:
        ways = {"none": [False] * beside, "one": [True, *[False] * (beside - 1)], "all": [True] * beside}
        found: dict[str, list[float]] = {name: [] for name in ways}
        await gap(runtime, model, num_tokens, ways["none"], serial)
        for number in range(rounds):
            order = list(ways) if number % 2 == 0 else list(reversed(ways))
            for name in order:
                found[name].append(await gap(runtime, model, num_tokens, ways[name], serial))
        over = {name: [a / b for a, b in zip(found[name], found["none"], strict=True)] for name in ("one", "all")}
        rows.append(
            {
                "streams": 1 + beside,
                "beside none": median(found["none"]),
                "beside one": median(found["one"]),
                "one over none": round(median(over["one"]), 3),
                "all over none": round(median(over["all"]), 3),
            }
        )
    return rows


def main() -> None:
    """Measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    num_tokens, rounds = (24, 1) if args.quick else (160, args.rounds)
    config = load_config(args.config)
    rows = in_process(config, lambda runtime: rows_of(runtime, args.ensemble, num_tokens, rounds))
    told = "streams: gap beside one traced over none"
    checks = [
        Check(
            f"{row['streams']} {told}",
            float(str(row["one over none"])),
            "<=",
            BOUND,
        )
        for row in rows
        if row["streams"] == 1 + max(BESIDE)
    ]
    settings = {"model": args.ensemble, "tokens": num_tokens, "rounds": rounds, "quick": args.quick}
    Findings("traced", {"gaps": rows}, checks, settings).print()


if __name__ == "__main__":
    main()

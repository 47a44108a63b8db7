"""A step while another process keeps one core busy, against the same step on a machine that is idle.

    python -m benchmarks.busy [--config configs/demo.yaml] [--ensemble duet] [--rounds 3] [--quick]

In turns, in one engine: decode steps of B rows at a mean context of 256 tokens, first with nothing else on the
machine, then beside a process that counts in a loop. Median milliseconds from step to step, and the longest in a
hundred (p99); the ratio is that of the medians of a round, and the median of all rounds counts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from tqdm import tqdm

from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.recorder import DecodeBench, step_to_step
from benchmarks.stopwatch import percentile
from ensemble_core.config_file import load_config

BATCHES = (1, 8, 32)
BOUND = 1.9
LENGTH, STEPS = 256, 48


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that never waits, on a machine that has one core fewer for as long."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def steps(bench: DecodeBench, model: str, batch: int, num: int) -> list[float]:
    """Seconds from step to step."""
    return step_to_step(bench.decode(model, batch, LENGTH, num))


def row(batch: int, alone: list[list[float]], beside: list[list[float]]) -> dict[str, Value]:
    """Of all rounds."""
    every, other = ([s for each in rounds for s in each] for rounds in (alone, beside))
    each_round = [median(b) / median(a) for a, b in zip(alone, beside, strict=True)]
    return {
        "B": batch,
        "alone ms": 1e3 * median(every),
        "p99 alone": 1e3 * percentile(every, 99),
        "beside ms": 1e3 * median(other),
        "p99 beside": 1e3 * percentile(other, 99),
        "beside / alone": median(each_round),
        "over rounds": f"{min(each_round):.2f} .. {max(each_round):.2f}",
    }


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default="duet")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds, num, batches = (1, 8, (1, 2)) if args.quick else (args.rounds, STEPS, BATCHES)
    bench = DecodeBench(load_config(args.config))
    rows = []
    try:
        for batch in tqdm(batches, desc="batches", disable=None):
            alone, beside = [], []
            for _ in range(rounds):
                alone.append(steps(bench, args.ensemble, batch, num))
                with busy_process():
                    beside.append(steps(bench, args.ensemble, batch, num))
            rows.append(row(batch, alone, beside))
    finally:
        bench.close()
    checks = [
        Check(
            f"step beside a busy process / alone, B = {each['B']}", float(str(each["beside / alone"])), "<=", BOUND
        )
        for each in rows
    ]
    settings = {"model": args.ensemble, "rounds": rounds, "steps": num, "length": LENGTH, "quick": args.quick}
    Findings("busy", {"steps": rows}, checks, settings).print()


if __name__ == "__main__":
    main()

"""How long a server takes to start: from the start of its process to /ready, and then to its first answer.

    python -m benchmarks.start [--config configs/demo.yaml] [--rounds 5] [--quick]

Everything is fetched, built and compiled before, and the first round, which fills the page cache, does not count.
The first answer is one token of the first ensemble after a prompt of a few words: what a client waits for that asks
the moment the server is ready. Seconds, medians over rounds.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import prose
from benchmarks.ledger import Findings, Value, arguments
from benchmarks.stopwatch import Spread
from benchmarks.traffic import Call, play, serving
from ensemble_core.config_file import load_config


def one_start(config: Path, model: str) -> tuple[float, float]:
    """Seconds to /ready, and from there to the first token."""
    started = time.perf_counter()
    with serving(config) as url:
        ready = time.perf_counter() - started
        (stream,) = asyncio.run(play(url, [Call(model, prose.sentences(0, 1), 1)]))
    return ready, stream.ttft


def row(what: str, seconds: list[float]) -> dict[str, Value]:
    """Of the table."""
    spread = Spread.of(seconds)
    return {"what": what, "seconds": spread.median, "quartiles": f"{spread.low:.2f} .. {spread.high:.2f}"}


def main() -> None:
    """Start a server again and again."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    model = next(iter(load_config(args.config).ensembles))
    turns = tqdm(range(rounds + 1), desc="starts", unit="start", disable=None)
    seen = [one_start(args.config, model) for _ in turns][1:]
    ready, answered = map(list, zip(*seen, strict=True))
    rows = [row("process to /ready", ready), row("/ready to the first token", answered)]
    Findings("start", {"starts": rows}, settings={"model": model, "rounds": rounds, "quick": args.quick}).print()


if __name__ == "__main__":
    main()

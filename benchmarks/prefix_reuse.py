"""Time to the first token of a request whose prompt begins like an earlier one's, against that of the earlier one.

    python -m benchmarks.prefix_reuse [--config configs/demo.yaml] [--quick]

Through a server process, streaming. Each round has its own few-shot prompt of 1,000 tokens, which nobody has seen:
first with one question, then with another question, then with the last question again. Seconds are medians over
rounds; ratios are taken round by round.
"""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks import prose
from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.stopwatch import Spread, ratios
from benchmarks.traffic import Call, play, serving
from ensemble_core.config_file import load_config
from ensemble_core.members.loading.checkpoints import load_tokenizer

BOUND = 0.15
KINDS = ("first", "other question", "same again")


def ttfts(url: str, model: str, tokenizer: Any, length: int, seed: int) -> tuple[list[float], int]:
    """Seconds to the first token of the three requests, and the length of the shared part in tokens."""
    shots = prose.examples(tokenizer, seed, length)
    prompts = [shots + prose.question(s) for s in (1, 2, 2)]
    streams = [asyncio.run(play(url, [Call(model, prompt, 4)]))[0] for prompt in prompts]
    return [stream.ttft for stream in streams], len(tokenizer.encode(shots))


def main() -> None:
    """Measure the first ensemble of the configuration."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--length", type=int, default=1000, help="shared tokens")
    args = parser.parse_args()
    config = load_config(args.config)
    model = next(iter(config.ensembles))
    main_member = config.ensembles[model].main
    tokenizer = load_tokenizer(main_member, config.members[main_member])
    rounds = 2 if args.quick else args.rounds
    with serving(args.config) as url:
        asyncio.run(play(url, [Call(model, prose.sentences(0, 4), 8)]))  # warm
        measured = [ttfts(url, model, tokenizer, args.length, seed) for seed in range(rounds)]
    seconds = dict(zip(KINDS, zip(*(each for each, _ in measured), strict=True), strict=True))
    rows: list[dict[str, Value]] = []
    for kind in KINDS:
        ratio = ratios(seconds[kind], seconds["first"])
        row: dict[str, Value] = {"request": kind, "TTFT s": Spread.of(seconds[kind]).median}
        rows.append(row | {"over the first": ratio.median, "quartiles": f"{ratio.low:.3f} .. {ratio.high:.3f}"})
    shared = min(length for _, length in measured)
    figure = ratios(seconds["other question"], seconds["first"]).median
    check = Check(f"{model}: second TTFT / first, {shared} shared tokens", figure, "<=", BOUND)
    Findings(
        "prefix_reuse", {"requests": rows}, [check], {"model": model, "rounds": rounds, "quick": args.quick}
    ).print()


if __name__ == "__main__":
    main()

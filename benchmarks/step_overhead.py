"""A lockstep step against its members' forwards, and where the rest goes.

    python -m benchmarks.step_overhead [--config configs/demo.yaml] [--quick]

From the engine's own records of decode steps at a mean context of 256 tokens. `forwards` runs from the start of the
first forward to the end of the last; `their sum` adds up what each took, which is more where they run side by side.
`rest` is what is left of the step: scheduling, packing the feeds, appending tokens, reports. Milliseconds are medians
over steps; the ratio is taken step by step, so it holds on a noisy machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.ledger import Check, Findings, Value, arguments
from benchmarks.recorder import DecodeBench, Told
from benchmarks.stopwatch import Spread, ratios
from ensemble_core.config_file import load_config

BOUNDS = {1: 1.06, 32: 1.12}


def summarise(model: str, batch: int, steps: Sequence[Told]) -> dict[str, Value]:
    """One row of the table."""
    parts = [
        {
            "step ms": told.stats.seconds,
            "forwards": told.stats.forwards_seconds,
            "fusion": sum(fusion.seconds for fusion in told.stats.fusions),
            "alignment": told.stats.alignment_seconds,
            "sampling": told.stats.sampling_seconds,
        }
        for told in steps
    ]
    for part in parts:
        part["rest"] = 2 * part["step ms"] - sum(part.values())
    ratio = ratios([part["step ms"] for part in parts], [part["forwards"] for part in parts])
    medians = {name: Spread.of([part[name] for part in parts]).scaled(1e3).median for name in parts[0]}
    medians["their sum"] = Spread.of([told.forward_seconds for told in steps]).scaled(1e3).median
    return {
        "ensemble": model,
        "B": batch,
        "steps": len(steps),
        **medians,
        "step / forwards": ratio.median,
        "quartiles": f"{ratio.low:.3f} .. {ratio.high:.3f}",
    }


def main() -> None:
    """Measure every ensemble of the configuration at each batch size."""
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--length", type=int, default=256, help="mean context, in main's tokens")
    args = parser.parse_args()
    batches, num_steps = ([1, 4], 6) if args.quick else (args.batch, args.steps)
    config = load_config(args.config)
    bench = DecodeBench(config)
    rows, checks = [], []
    for model in config.ensembles:
        for batch in batches:
            row = summarise(model, batch, bench.decode(model, batch, args.length, num_steps))
            rows.append(row)
            if bound := BOUNDS.get(batch):
                what = f"{model}: step / its members' forwards, B = {batch}"
                checks.append(Check(what, float(str(row["step / forwards"])), "<=", bound))
    settings = {"steps": num_steps, "length": args.length, "quick": args.quick}
    Findings("step_overhead", {"steps": rows}, checks, settings).print()


if __name__ == "__main__":
    main()

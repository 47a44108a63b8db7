"""A lockstep step against the sum of its members' forwards, from the engine's own records.

    python benchmarks/step_overhead.py --config configs/demo.yaml

Prints a table (milliseconds, medians over decode steps) and then one JSON line. The ratio is taken step by step in
one run, so it holds on a noisy machine.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM
from ensemble_core.stats import NullSink, StepStats

PROMPT = "Everybody who has lived by the sea knows that the weather there can change within minutes. " * 3


class StepRecorder(NullSink):
    """Keeps the records of all steps."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []

    def step(self, stats: StepStats) -> None:
        """Keep it."""
        self.steps.append(stats)


def decode_steps(llm: LLM, sink: StepRecorder, model: str, batch: int, tokens: int) -> list[StepStats]:
    """Records of steps in which all `batch` sequences decode, without the first few."""
    sink.steps.clear()
    llm.generate([PROMPT] * batch, SamplingParams(max_tokens=tokens, temperature=0.0), model=model)
    full = [s for s in sink.steps if s.batch_size == batch and all(m.phase == "decode" for m in s.members)]
    return full[3:]


def summarise(model: str, batch: int, steps: list[StepStats]) -> dict[str, float | int | str]:
    """Medians in milliseconds, and the median of the step-by-step ratio."""
    forwards = [sum(m.forward_seconds for m in s.members) for s in steps]
    return {
        "model": model,
        "batch": batch,
        "steps": len(steps),
        "step_ms": 1e3 * median(s.seconds for s in steps),
        "forwards_ms": 1e3 * median(forwards),
        "fusion_ms": 1e3 * median(sum(f.seconds for f in s.fusions) for s in steps),
        "alignment_ms": 1e3 * median(s.alignment_seconds for s in steps),
        "sampling_ms": 1e3 * median(s.sampling_seconds for s in steps),
        "ratio": median(s.seconds / f for s, f in zip(steps, forwards, strict=True)),
    }


def main() -> None:
    """Measure every ensemble of the configuration at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    sink = StepRecorder()
    llm = LLM(args.config, sink)
    rows = []
    for info in llm.models:
        if info.kind != "ensemble":
            continue
        for batch in args.batch:
            rows.append(summarise(info.name, batch, decode_steps(llm, sink, info.name, batch, args.tokens)))
            print_row(rows[-1], header=len(rows) == 1)
    print(json.dumps({"benchmark": "step_overhead", "rows": rows}))


def print_row(row: dict[str, float | int | str], *, header: bool) -> None:
    """One line of the table."""
    if header:
        print(" ".join(f"{name:>13}" for name in row))
    print(" ".join(f"{v:13.3f}" if isinstance(v, float) else f"{v:>13}" for v in row.values()))


if __name__ == "__main__":
    main()

"""Our ensemble step against the sum of vLLM's decode steps of the members alone, on the same machine.

    make bench-vllm        (makes .venv-vllm, then runs this)
    python -m benchmarks.against_vllm [--config configs/demo.yaml] [--rounds 2] [--quick]

In turns, a process each: our ensemble, then each member alone under vLLM's CPU build, and again. Mean context 256, B
equal rows of bf16. Ours is the time from step to step through the offline API: schedule, forwards, fusion, sampling,
text. vLLM's is the slope between runs of n and 2n tokens through its own (see vllm_decode.py). Medians over all steps
or slopes of all rounds; the ratio is that of the medians, with its range over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.ledger import ROOT, Check, Findings, Value, arguments
from ensemble_core.config import load_config
from ensemble_core.members.loading.checkpoints import resolve_folder

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENSEMBLE = "duet"
BOUND = 1.15
KV_GIB = "2"  # vLLM takes a share of the memory otherwise

Steps = dict[int, list[float]]  # batch -> seconds a step


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Our steps; what this script does as a child of itself."""
    from benchmarks.recorder import DecodeBench, step_to_step

    bench = DecodeBench(load_config(args.config))
    steps: Steps = {}
    for batch in args.batch:
        told = bench.decode(args.ensemble, batch, args.length, args.tokens * args.repeats)
        steps[batch] = step_to_step(told)
    return {"steps": steps}


def run(command: Sequence[str | Path]) -> dict[str, Any]:
    """The JSON of a child's last line. Raises SystemExit with the end of what it said where it fails."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": KV_GIB, "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    answer["steps"] = {int(batch): seconds for batch, seconds in answer["steps"].items()}
    return answer


def commands(args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """Who takes part: our ensemble first, then each of its members under vLLM."""
    config = load_config(args.config)
    shape = ["--batch", *map(str, args.batch), "--length", str(args.length)]
    shape += ["--tokens", str(args.tokens), "--repeats", str(args.repeats)]
    own = [sys.executable, "-m", "benchmarks.against_vllm", "--ours", "--config", args.config]
    found: dict[str, list[str | Path]] = {args.ensemble: [*own, "--ensemble", args.ensemble, *shape]}
    for member in config.ensembles[args.ensemble].members:
        folder = resolve_folder(config.members[member])
        found[member] = [PYTHON, ROOT / "benchmarks" / "vllm_decode.py", folder, *shape]
    return found


def row(ensemble: str, batch: int, rounds: Sequence[Mapping[str, Steps]]) -> dict[str, Value]:
    """Medians of all rounds, and the ratio of each round."""
    members = [name for name in rounds[0] if name != ensemble]
    medians = {name: 1e3 * median([s for each in rounds for s in each[name][batch]]) for name in rounds[0]}
    each_round = [
        median(each[ensemble][batch]) / sum(median(each[name][batch]) for name in members) for each in rounds
    ]
    total = sum(medians[name] for name in members)
    return {
        "B": batch,
        **{f"vLLM {name} ms": medians[name] for name in members},
        "vLLM sum ms": total,
        f"our {ensemble} ms": medians[ensemble],
        "ours / sum": medians[ensemble] / total,
        "over rounds": f"{min(each_round):.3f} .. {max(each_round):.3f}",
    }


def measure(args: argparse.Namespace) -> Findings:
    """All rounds of all contestants."""
    contestants = commands(args)
    rounds: list[dict[str, Steps]] = []
    versions: dict[str, Any] = {}
    with tqdm(total=args.rounds * len(contestants), unit="process", disable=None) as bar:
        for _ in range(args.rounds):
            rounds.append({})
            for name, command in contestants.items():
                bar.set_description(name)
                answer = run(command)
                rounds[-1][name] = answer.pop("steps")
                versions |= answer
                bar.update()
    rows = [row(args.ensemble, batch, rounds) for batch in args.batch]
    checks = [
        Check(
            f"{args.ensemble} step / sum of vLLM's steps, B = {each['B']}",
            float(str(each["ours / sum"])),
            "<=",
            BOUND,
        )
        for each in rows
    ]
    settings = {"rounds": args.rounds, "length": args.length, "tokens": args.tokens, "quick": args.quick}
    return Findings(
        "against_vllm",
        {"steps": rows},
        checks,
        settings | {"vllm": versions["vllm"], "vllm_torch": versions["torch"]},
    )


def main() -> None:
    """Run the parent, or our side as a child."""
    parser = arguments(__doc__)
    parser.add_argument("--ensemble", default=ENSEMBLE)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args)))
        return
    if not PYTHON.exists():
        raise SystemExit("vLLM is not installed beside this project; run `make bench-vllm`")
    if args.quick:
        args.batch, args.tokens, args.repeats, args.rounds = [1, 4], 8, 1, 1
    measure(args).print()


if __name__ == "__main__":
    main()

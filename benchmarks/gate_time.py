"""What a gate costs a step: weights of B rows from M members' candidates, on one thread.

    python -m benchmarks.gate_time [--quick]

No model takes part: candidates are random, over vocabularies of the demo pair's sizes (main 262,144 tokens,
assistants 49,152), K = 256; the gate is as wide as those that `unisono tune --method gate` writes. Milliseconds are
the least of several medians of CPU time, since other work on the machine only adds to it.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from benchmarks.ledger import Check, Findings, Value, arguments
from ensemble_core.fitting.fit_gate import NUM_GATES
from ensemble_core.fitting.gate_training import HIDDEN
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.evidence import NAMES
from ensemble_core.fusion.gate import GateNumbers, WeightGate
from ensemble_core.members.base import Candidates
from ensemble_core.members.candidates import top_candidates
from ensemble_core.text.vocabulary import Vocabulary

SIZES = (262_144, 49_152)  # of main, of an assistant
K = 256
MOST = 0.3  # ms at B = 32 for two members
ROUNDS = 9


def vocabulary(size: int) -> Vocabulary:
    """Tokens that are numbers in words of one to five bytes."""
    return Vocabulary([f" {i:x}".encode() for i in range(size)], frozenset(), frozenset({0}), lambda text: [])


def gate_over(num: int, spoken: list[Vocabulary]) -> WeightGate:
    """A random gate over main and `num` - 1 assistants."""
    draw = torch.Generator().manual_seed(0)
    width, hidden = len(NAMES), NUM_GATES * HIDDEN
    numbers = GateNumbers(
        mean=torch.zeros(num, width),
        spread=torch.ones(num, width),
        inner=torch.randn(num, width, hidden, generator=draw) / width,
        shift=torch.zeros(num, hidden),
        outer=torch.randn(num, hidden, generator=draw) / hidden,
        bias=torch.zeros(num),
    )
    names = tuple(f"member{i}" for i in range(num))
    space = FusionSpace([spoken[0], *[spoken[1]] * (num - 1)], list, torch.device("cpu"), names)
    return WeightGate.over(space, numbers)


def candidates(num: int, rows: int) -> list[Candidates]:
    """Random answers of main and `num` - 1 assistants."""
    draw = torch.Generator().manual_seed(1)
    sizes = [SIZES[0], *[SIZES[1]] * (num - 1)]
    return [top_candidates(4 * torch.randn(rows, size, generator=draw), K) for size in sizes]


@torch.inference_mode()
def milliseconds(gate: WeightGate, parts: list[Candidates], repeats: int) -> float:
    """The least median of CPU time of a call."""
    weights = torch.full((len(parts[0]), len(parts)), 1.0 / len(parts))
    medians = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(repeats):
            started = time.thread_time()
            gate.weigh(parts, weights)
            times.append(time.thread_time() - started)
        medians.append(median(times))
    return 1e3 * min(medians)


def main() -> None:
    """Measure two, three and eight members at one row and at 32."""
    parser = arguments(__doc__, config=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 5 if args.quick else 100
    spoken = [vocabulary(size) for size in SIZES]
    rows: list[dict[str, Value]] = []
    for num in (2, 3, 8):
        gate = gate_over(num, spoken)
        times = {f"B {batch}": milliseconds(gate, candidates(num, batch), repeats) for batch in (1, 32)}
        rows.append({"members": num, **times})
    check = Check("two members, 32 rows, ms", float(str(rows[0]["B 32"])), "<=", MOST)
    settings = {"K": K, "hidden units of each member": NUM_GATES * HIDDEN, "quick": args.quick}
    Findings("gate_time", {"gates": rows}, [check], settings).print()


if __name__ == "__main__":
    main()

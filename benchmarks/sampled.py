"""The sampled mode against lockstep with the same pool: tokens per second in one process, side by side.

    python -m benchmarks.sampled [--config configs/demo.yaml] [--quick]

For each number of places B, the same prompts of five kinds run at temperature 0.7 in lockstep and in sampled, in
turn, as in `benchmarks.verify`. Texts differ, since lockstep tempers the pool and sampled its members; every answer
has exactly as many tokens (ends of text are ignored). Forwards and tokens fed are those in sampled for each one in
lockstep. `drawn`: final tokens that were drawn from the assistant's distribution, or from main's alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.ledger import Check, Findings, TableRow, arguments
from benchmarks.verify import Bench, Plan
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.stats import DrawStats, Stats, StepStats

MODEL = "duet-sampled"
BOUND = 1.6  # tokens/s over lockstep's for one stream
TEMPERATURE = 0.7


@dataclass(frozen=True, slots=True)
class Told:
    """What the engine told of one run, by member."""

    forwards: Counter[str]
    fed: Counter[str]
    drawn: Counter[str]


class DrawBench(Bench):
    """Also counts tokens that members were fed, and draws."""

    def __init__(self, config: Config, places: int) -> None:
        self.fed: Counter[str] = Counter()
        self.drawn: Counter[str] = Counter()
        super().__init__(config, places)

    def _take(self, stats: Stats) -> None:
        super()._take(stats)
        if isinstance(stats, StepStats):
            self.fed.update({each.member: each.decode_tokens for each in stats.members})
        elif isinstance(stats, DrawStats):
            self.drawn.update(stats.drawn)

    def tell(self) -> Told:
        """What was counted since the last time."""
        told = Told(self.forwards.copy(), self.fed, self.drawn)
        self.fed, self.drawn = Counter(), Counter()
        return told


def side_by_side(config: Config, places: int, plan: Plan) -> TableRow:
    """Both modes in turn; medians."""
    bench, main = DrawBench(config, places), config.ensembles[MODEL].main
    params = SamplingParams(max_tokens=plan.num_tokens, temperature=TEMPERATURE, ignore_eos=True, seed=1)
    prompts = plan.prompts(places)
    bench.rate(MODEL, "sampled", prompts[:places], params)
    seeded = [replace(params, seed=seed) for seed in range(len(prompts))]  # with one seed all would draw alike
    rates: dict[str, list[float]] = {"lockstep": [], "sampled": []}
    told: dict[str, Told] = {}
    for _ in range(plan.rounds):
        for mode, found in rates.items():
            bench.tell()
            found.append(bench.rate(MODEL, mode, prompts, seeded))
            told[mode] = bench.tell()
    lockstep, sampled = told["lockstep"], told["sampled"]
    (assistant,) = [member for member in lockstep.forwards if member != main]
    return {
        "B": places,
        "main": main,
        "lockstep tokens/s": round(median(rates["lockstep"]), 1),
        "sampled tokens/s": round(median(rates["sampled"]), 1),
        "over lockstep": round(median(rates["sampled"]) / median(rates["lockstep"]), 2),
        "drawn": f"{100 * sampled.drawn[assistant] / sampled.drawn.total():.0f} %",
        "main's forwards": round(sampled.forwards[main] / lockstep.forwards[main], 2),
        "assistant's": round(sampled.forwards[assistant] / lockstep.forwards[assistant], 2),
        "main's tokens": round(sampled.fed[main] / lockstep.fed[main], 2),
        "assistant's tokens": round(sampled.fed[assistant] / lockstep.fed[assistant], 2),
    }


def measure(config: Config, plan: Plan, quick: bool) -> Findings:
    """Every number of places."""
    rows: Sequence[TableRow] = [side_by_side(config, places, plan) for places in plan.places]
    checks = [
        Check("B = 1, sampled at 0.7: over lockstep", float(row["over lockstep"] or 0), ">=", BOUND)
        for row in rows
        if row["B"] == 1
    ]
    settings = {"quick": quick, "tokens of an answer": plan.num_tokens, "rounds": plan.rounds}
    return Findings("sampled", {"modes": rows}, checks, settings)


def main() -> None:
    """Measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often both modes run in turn")
    parser.add_argument("--places", type=int, nargs="+", default=[1, 8, 32], help="numbers of places")
    args = parser.parse_args()
    plan = Plan(places=args.places, rounds=args.rounds)
    if args.quick:
        plan = Plan(places=(1, 2), num_tokens=16, rounds=1)
    measure(load_config(args.config), plan, args.quick).print()


if __name__ == "__main__":
    main()

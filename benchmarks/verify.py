"""The verify mode against lockstep: tokens per second in one process, side by side.

    python -m benchmarks.verify [--config configs/demo.yaml] [--quick]

For each main member, number of places B and temperature, the same prompts of five kinds run through B places in
lockstep and in verify, in turn. There are two or three prompts a place (five for B = 1), so that places stay filled
until the last ones end. Every answer has exactly as many tokens (ends of text are ignored). `stayed`: drafted tokens
that stayed. `fused`: final tokens that a fusion decided. Forwards are those in verify for each one in lockstep. One
stream stands beside main alone, too.

A second table has the draft's length at B = 1, by who guesses what main drafts: nobody, lookup, or the assistant as
drafter. Greedy texts of small models repeat themselves, so lookup finds more in them than it would elsewhere. A plot
of it is written beside the results.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.ledger import Check, Findings, TableRow, arguments, results_folder
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM
from ensemble_core.stats import DraftStats, Stats, StepStats

KINDS = (
    "Question: Why is the sky blue during the day?\nAnswer:",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Once upon a time, in a village by the sea, there lived a fisherman who",
    "The ten largest cities of Europe are:\n1.",
    "User: Hi! Can you recommend me a book about history?\nAssistant:",
)
MODELS = ("duet", "duet-smollm2")
BOUNDS = {1: 1.5, 8: 1.2, 32: 0.98}  # tokens/s over lockstep's, greedy
AIM = 1.3  # seconds a token over main's alone


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to run."""

    places: Sequence[int] = (1, 8, 32)
    temperatures: Sequence[float] = (0.0, 0.7)
    num_tokens: int = 128
    rounds: int = 2
    lengths: Sequence[int] = (1, 2, 4, 8)

    def prompts(self, places: int) -> list[str]:
        """Prompts of all kinds; those of a kind differ by spaces at the end."""
        num = 5 if places == 1 else 3 * places if places < 32 else 2 * places
        return [KINDS[i % 5] + " " * (i // 5) for i in range(num)]


QUICK = Plan(places=(1, 2), temperatures=(0.0,), num_tokens=16, rounds=1, lengths=(2,))


class Bench:
    """The models with a number of places, and what their engine tells."""

    def __init__(self, config: Config, places: int) -> None:
        limits = config.scheduler.model_copy(update={"max_running": places})
        self.llm = LLM(config.model_copy(update={"scheduler": limits}), self._take)
        self.forwards: Counter[str] = Counter()
        self.drafts: Counter[str] = Counter()

    def _take(self, stats: Stats) -> None:
        if isinstance(stats, StepStats):
            self.forwards.update(each.member for each in stats.members)
        elif isinstance(stats, DraftStats):
            decided = stats.consulted + stats.agreed + stats.certified + stats.alone
            self.drafts.update(
                drafted=stats.drafted, accepted=stats.accepted, consulted=stats.consulted, decided=decided
            )

    def rate(
        self,
        model: str,
        mode: str | None,
        prompts: list[str],
        params: SamplingParams | list[SamplingParams],
        **options: Any,
    ) -> float:
        """Tokens per second of all answers together. mode: None for a member alone."""
        self.forwards.clear()
        self.drafts.clear()
        started = time.perf_counter()
        answers = self.llm.generate(prompts, params, model, Overrides(mode=mode, mode_options=options or None))
        return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def side_by_side(bench: Bench, places: int, model: str, main: str, temperature: float, plan: Plan) -> TableRow:
    """Both modes in turn; medians."""
    params = SamplingParams(max_tokens=plan.num_tokens, temperature=temperature, ignore_eos=True, seed=1)
    prompts = plan.prompts(places)
    bench.rate(model, "verify", prompts[:places], params)  # costs and habits are learnt
    lockstep, verify, alone = [], [], []
    for _ in range(plan.rounds):
        if places == 1:
            alone.append(bench.rate(main, None, prompts, params))
        lockstep.append(bench.rate(model, "lockstep", prompts, params))
        forwards = bench.forwards.copy()
        verify.append(bench.rate(model, "verify", prompts, params))
    (assistant,) = [member for member in bench.forwards if member != main]
    drafts = bench.drafts
    return {
        "B": places,
        "main": main,
        "temperature": temperature,
        "lockstep tokens/s": round(median(lockstep), 1),
        "verify tokens/s": round(median(verify), 1),
        "over lockstep": round(median(verify) / median(lockstep), 2),
        "main alone tokens/s": round(median(alone), 1) if alone else None,
        "stayed": f"{100 * drafts['accepted'] / max(drafts['drafted'], 1):.0f} %",
        "fused": f"{100 * drafts['consulted'] / drafts['decided']:.0f} %",
        "main's forwards": round(bench.forwards[main] / forwards[main], 2),
        "assistant's": round(bench.forwards[assistant] / forwards[assistant], 2),
    }


def lengths(bench: Bench, model: str, main: str, assistant: str, plan: Plan) -> list[TableRow]:
    """One greedy stream by the length of its drafts, and by who guesses what main drafts."""
    params = SamplingParams(max_tokens=plan.num_tokens, temperature=0.0, ignore_eos=True, seed=1)
    prompts = plan.prompts(1)
    base = bench.rate(model, "lockstep", prompts, params)
    rows: list[TableRow] = []
    drafts: tuple[int | str, ...] = (*plan.lengths, "auto")
    for draft in drafts:
        ways: dict[str, dict[str, bool | str]] = {
            "nobody": {"lookup": False},
            "lookup": {"lookup": True},
            assistant: {"drafter": assistant},
        }
        for guesser, options in ways.items():
            rate = bench.rate(model, "verify", prompts, params, draft=draft, **options)
            told, forwards = bench.drafts, bench.forwards
            rows.append(
                {
                    "main": main,
                    "draft": draft,
                    "guesses by": guesser,
                    "tokens/s": round(rate, 1),
                    "over lockstep": round(rate / base, 2),
                    "fused": round(told["consulted"] / told["decided"], 3),
                    "main's forwards a token": round(forwards[main] / told["decided"], 2),
                }
            )
    return rows


def measure(config: Config, plan: Plan, quick: bool) -> Findings:
    """Everything."""
    models = {name: config.ensembles[name].main for name in MODELS}
    rows: list[TableRow] = []
    by_length: list[TableRow] = []
    for places in plan.places:
        bench = Bench(config, places)
        for model, main in models.items():
            rows += [side_by_side(bench, places, model, main, each, plan) for each in plan.temperatures]
            if places == 1:
                (assistant,) = config.ensembles[model].members.keys() - {main}
                by_length += lengths(bench, model, main, assistant, plan)
    checks = [
        Check(
            f"B = {row['B']}, {row['main']} as main, greedy: over lockstep",
            float(row["over lockstep"] or 0),
            ">=",
            bound,
        )
        for row in rows
        if row["temperature"] == 0.0 and (bound := BOUNDS.get(int(row["B"] or 0)))
    ]
    checks += [
        Check(f"B = 1, {row['main']} as main, greedy: time a token over main's alone", _slower(row), "<=", AIM)
        for row in rows
        if row["temperature"] == 0.0 and row["B"] == 1
    ]
    draw(by_length, quick)
    settings = {"quick": quick, "tokens of an answer": plan.num_tokens, "rounds": plan.rounds}
    return Findings("verify", {"modes": rows, "draft": by_length}, checks, settings)


def _slower(row: TableRow) -> float:
    return round(float(row["main alone tokens/s"] or 0) / float(row["verify tokens/s"] or 1), 2)


def draw(rows: Sequence[TableRow], quick: bool) -> None:
    """Tokens per second over the length of drafts, and the share of tokens that were fused."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for main in dict.fromkeys(str(row["main"]) for row in rows):
        guessers = dict.fromkeys(str(row["guesses by"]) for row in rows if row["main"] == main)
        for guesser, line in zip(guessers, ("--", "-", ":"), strict=True):
            own = [row for row in rows if row["main"] == main and row["guesses by"] == guesser]
            names = [str(row["draft"]) for row in own]
            for axis, key in zip(axes, ("over lockstep", "fused"), strict=True):
                axis.plot(names, [row[key] for row in own], line, marker="o", label=f"{main}, {guesser}")
    for axis, title in zip(axes, ("tokens/s over lockstep's", "share of tokens that are fused"), strict=True):
        axis.set(xlabel="tokens of a draft", ylabel=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].axhline(1.0, color="grey", linewidth=1)
    axes[0].legend(title="main, who guesses")
    folder = results_folder("benchmarks", quick)
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / "verify.png", dpi=110)


def main() -> None:
    """Measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="how often both modes run in turn")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[1, 2, 4, 8], help="tokens of a draft, beside auto"
    )
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan(rounds=args.rounds, num_tokens=args.tokens, lengths=args.lengths)
    measure(load_config(args.config), plan, args.quick).print()


if __name__ == "__main__":
    main()

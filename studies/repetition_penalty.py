"""Which rule on log-probabilities comes closest to what a repetition penalty does to one model's raw logits.

    python -m studies.repetition_penalty [--config configs/demo.yaml] [--data ../shared/data] [--quick]

transformers and vLLM divide positive logits of repeated tokens by the penalty and multiply negative ones. A fused
distribution has no raw logits: adding a constant to a model's logits changes no probability. So each rule here sees
log-probabilities alone, and is compared with what transformers' own processor makes of one member's raw logits, over
its K likeliest tokens, made to sum to 1 again: total variation, KL divergence, and the mass that repeated tokens
keep. Positions are those of each member's greedy continuations of the tasks' prompts, where loops happen. The
constant of a rule is chosen on even documents; every figure is of odd ones. Prints tables and then one JSON line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, RepetitionPenaltyLogitsProcessor

from benchmarks.ledger import Check, Findings, Value, arguments
from ensemble_core.config_file import load_config
from ensemble_core.decoding.shaping import TYPICAL_NORMALISER, penalise_repeats
from ensemble_core.evaluation.tasks import Split
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading.checkpoints import resolve_folder
from studies.halves import DATA, load_tasks

PENALTIES = (0.9, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0)
CONSTANTS = (10.0, 14.0, 18.0, 20.0, 22.0, 24.0, 26.0, 30.0)
NUM_CANDIDATES = 256
NUM_NEW = 64  # tokens of a continuation
NUM_TOGETHER = 20  # prompts
CERTAIN = 0.9  # a repeated token at least this likely is one that the penalty is meant for

Rule = Callable[[Tensor, float, float], Tensor]  # log-probabilities (P, K), penalty, constant -> those of repeats


def product(logprobs: Tensor, penalty: float, _: float) -> Tensor:
    """log p * penalty: next to nothing where p is near 1."""
    return logprobs * penalty


def log_odds(logprobs: Tensor, penalty: float, _: float) -> Tensor:
    """log p / (1 - p) in the place of the logit; what is left to the others stays theirs."""
    others = torch.log(-torch.expm1(logprobs.clamp_max(-1e-12)))
    return _as_logits(logprobs - others, penalty) + others


def below_peak(logprobs: Tensor, penalty: float, constant: float) -> Tensor:
    """The row's likeliest token stands at `constant`."""
    offset = constant - logprobs.amax(dim=1, keepdim=True)
    return _as_logits(logprobs + offset, penalty) - offset


def normalised(logprobs: Tensor, penalty: float, constant: float) -> Tensor:
    """The normaliser of the row is taken to be `constant`."""
    return _as_logits(logprobs + constant, penalty) - constant


def equal_shift(logprobs: Tensor, penalty: float, constant: float) -> Tensor:
    """Every repeated token loses the same."""
    return logprobs - (1.0 - 1.0 / penalty) * constant


def served(logprobs: Tensor, penalty: float, _: float) -> Tensor:
    """What Unisono does."""
    return penalise_repeats(logprobs, torch.tensor(penalty, dtype=logprobs.dtype))


def _as_logits(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


WITHOUT_CONSTANT: Mapping[str, Rule] = {"log p * penalty": product, "log-odds": log_odds}
WITH_CONSTANT: Mapping[str, Rule] = {
    "log p + C, peak at C": below_peak,
    "log p + C": normalised,
    "log p - (1 - 1/penalty) C": equal_shift,
}
SERVED = "served"


@dataclass(frozen=True, slots=True)
class Seen:
    """The K likeliest tokens at P positions of one member, and what transformers makes of them."""

    logprobs: Tensor  # (P, K) float64, of the whole vocabulary
    repeated: Tensor  # (P, K) bool, stands in the text before
    targets: Mapping[float, Tensor]  # penalty -> (P, K) float64 log-probabilities that sum to 1
    normaliser: Tensor  # (P,) float64, of the raw logits
    even: Tensor  # (P,) bool, of an even document

    def half(self, split: Split) -> Seen:
        """The positions of even or of odd documents."""
        kept = self.even if split == "even" else ~self.even
        targets = {penalty: target[kept] for penalty, target in self.targets.items()}
        return Seen(self.logprobs[kept], self.repeated[kept], targets, self.normaliser[kept], self.even[kept])

    def after(self, rule: Rule, penalty: float, constant: float) -> Tensor:
        """(P, K) log-probabilities that sum to 1, after a rule."""
        changed = torch.where(self.repeated, rule(self.logprobs, penalty, constant), self.logprobs)
        return changed.log_softmax(dim=1)

    def distance(self, rule: Rule, penalty: float, constant: float) -> float:
        """Mean total variation between a rule and transformers."""
        after = self.after(rule, penalty, constant).exp()
        return float((after - self.targets[penalty].exp()).abs().sum(dim=1).mean() / 2)

    def divergence(self, rule: Rule, penalty: float, constant: float) -> float:
        """Mean KL(transformers || rule), nats."""
        target = self.targets[penalty]
        return float((target.exp() * (target - self.after(rule, penalty, constant))).sum(dim=1).mean())

    def kept_mass(self, logprobs: Tensor) -> tuple[float, float]:
        """Mean mass of repeated tokens over all positions, and of those that were nearly certain before."""
        probs = logprobs.exp() * self.repeated
        certain = self.repeated & (self.logprobs.exp() >= CERTAIN)
        return float(probs.sum(dim=1).mean()), float(probs[certain].mean())


def continuations(folder: Path, prompts: Sequence[tuple[str, bool]], penalties: Sequence[float]) -> Seen:
    """What a model says along its own greedy text. prompts: text, and whether it is of an even document."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = []
    for start in range(0, len(prompts), NUM_TOGETHER):
        some = prompts[start : start + NUM_TOGETHER]
        given = tokenizer([prompt for prompt, _ in some], return_tensors="pt", padding=True)
        # The end of text is left out, so that every document has as many positions.
        texts = model.generate(**given, min_new_tokens=NUM_NEW, max_new_tokens=NUM_NEW, do_sample=False)
        for (_, even), padding, text in zip(some, (given.attention_mask == 0).sum(dim=1), texts, strict=True):
            own = text[int(padding) :]
            with torch.no_grad():
                logits = model(own[None, :-1], logits_to_keep=NUM_NEW).logits[0]
            parts.append(_seen(logits, own, len(own) - NUM_NEW, even, penalties))
    return _joined(parts)


def _seen(logits: Tensor, text: Tensor, start: int, even: bool, penalties: Sequence[float]) -> Seen:
    """logits: (P, V) that decide text[start:]."""
    normaliser = logits.double().logsumexp(dim=1)
    best = logits.topk(NUM_CANDIDATES, dim=1)
    pasts = [text[: start + at] for at in range(len(logits))]
    repeated = torch.stack([torch.isin(ids, past) for ids, past in zip(best.indices, pasts, strict=True)])
    targets = {}
    for penalty in penalties:
        process = RepetitionPenaltyLogitsProcessor(penalty)
        rows = [process(past[None], row[None]) for past, row in zip(pasts, logits, strict=True)]
        kept = torch.cat(rows).gather(1, best.indices)
        targets[penalty] = kept.double().log_softmax(dim=1)
    logprobs = best.values.double() - normaliser.unsqueeze(1)
    return Seen(logprobs, repeated, targets, normaliser, torch.full((len(logits),), even))


def _joined(parts: Sequence[Seen]) -> Seen:
    targets = {penalty: torch.cat([part.targets[penalty] for part in parts]) for penalty in parts[0].targets}
    return Seen(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.repeated for part in parts]),
        targets,
        torch.cat([part.normaliser for part in parts]),
        torch.cat([part.even for part in parts]),
    )


def mean_distance(seen: Sequence[Seen], rule: Rule, constant: float) -> float:
    """Total variation over members and penalties, each counting alike."""
    found = [part.distance(rule, penalty, constant) for part in seen for penalty in part.targets]
    return sum(found) / len(found)


def constants(even: Sequence[Seen]) -> tuple[dict[str, float], list[dict[str, Value]]]:
    """The best constant of each rule that has one, for all members together, and the sweep."""
    best: dict[str, float] = {}
    rows: list[dict[str, Value]] = []
    for name, rule in WITH_CONSTANT.items():
        found = {constant: mean_distance(even, rule, constant) for constant in CONSTANTS}
        best[name] = min(found, key=lambda constant: found[constant])
        rows.append({"rule": name, **{f"C = {constant:g}": found[constant] for constant in CONSTANTS}})
    return best, rows


def rule_rows(odd: Mapping[str, Seen], chosen: Mapping[str, float]) -> list[dict[str, Value]]:
    """A line for each member, penalty and rule; one more for the target itself."""
    rules = {**WITHOUT_CONSTANT, **WITH_CONSTANT, SERVED: served}
    rows: list[dict[str, Value]] = []
    for member, seen in odd.items():
        for penalty, target in seen.targets.items():
            where: dict[str, Value] = {"member": member, "penalty": penalty}
            rows.append(where | _row("transformers", None, 0.0, 0.0, seen.kept_mass(target)))
            for name, rule in rules.items():
                constant = chosen.get(name, 0.0)
                after = seen.kept_mass(seen.after(rule, penalty, constant))
                apart = seen.distance(rule, penalty, constant), seen.divergence(rule, penalty, constant)
                rows.append(where | _row(name, chosen.get(name), *apart, after))
    return rows


def _row(
    rule: str, constant: float | None, distance: float, divergence: float, mass: tuple[float, float]
) -> dict[str, Value]:
    return {
        "rule": rule,
        "C": constant,
        "TV": distance,
        "KL": divergence,
        "mass of repeats": mass[0],
        f"of p >= {CERTAIN}": mass[1],
    }


def member_rows(odd: Mapping[str, Seen]) -> list[dict[str, Value]]:
    """What the penalty meets: positions, repeats, and the normaliser that a rule has to guess."""
    rows: list[dict[str, Value]] = []
    for member, seen in odd.items():
        mass, certain = seen.kept_mass(seen.logprobs)
        rows.append(
            {
                "member": member,
                "positions": len(seen.logprobs),
                "mass of repeats": mass,
                f"of p >= {CERTAIN}": certain,
                "normaliser": float(seen.normaliser.mean()),
                "its deviation": float(seen.normaliser.std()),
            }
        )
    return rows


def mean_rows(odd: Mapping[str, Seen], chosen: Mapping[str, float]) -> list[dict[str, Value]]:
    """Total variation by rule, over members and penalties."""
    rules = {**WITHOUT_CONSTANT, **WITH_CONSTANT, SERVED: served}
    seen = list(odd.values())
    return [
        {"rule": name, "C": chosen.get(name), "TV": mean_distance(seen, rule, chosen.get(name, 0.0))}
        for name, rule in rules.items()
    ]


def prompts_of(folder: Path, num: int) -> list[tuple[str, bool]]:
    """`num` prompts of each half of every task."""
    halves: tuple[Split, Split] = ("even", "odd")
    return [
        (item.prompt, split == "even")
        for task in load_tasks(folder)
        for split in halves
        for item in task.chosen(split, num)
    ]


def study(members: Mapping[str, MemberConfig], prompts: Sequence[tuple[str, bool]], quick: bool) -> Findings:
    """Everything measured."""
    penalties = PENALTIES[-2:] if quick else PENALTIES
    seen = {name: continuations(resolve_folder(source), prompts, penalties) for name, source in members.items()}
    chosen, sweep = constants([part.half("even") for part in seen.values()])
    odd = {name: part.half("odd") for name, part in seen.items()}
    means = mean_rows(odd, chosen)
    apart = {str(row["rule"]): float(row["TV"] or 0.0) for row in means}
    share = apart[SERVED] / apart["log p * penalty"]
    checks = [Check("TV of the served rule, as a share of that of log p * penalty", share, "<=", 0.2)]
    tables = {"members": member_rows(odd), "constants": sweep, "rules": rule_rows(odd, chosen), "mean": means}
    settings = {
        "quick": quick,
        "K": NUM_CANDIDATES,
        "tokens of a continuation": NUM_NEW,
        "prompts": len(prompts),
        "C of the served rule": TYPICAL_NORMALISER,
    }
    return Findings("repetition_penalty", tables, checks, settings)


def main() -> None:
    """Measure, tell."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the development tasks")
    args = parser.parse_args()
    prompts = prompts_of(args.data, 1 if args.quick else 6)
    study(load_config(args.config).members, prompts, args.quick).print()


if __name__ == "__main__":
    main()

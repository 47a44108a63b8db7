"""Learns an ensemble's gate on one half of the tasks and reports on the other: `unisono tune --method gate`.

What is learnt from is stored scores: no model runs once they are there. The loss is the linear pool's over main's
vocabulary (`gate_training.py`), whatever fusion the ensemble has; the report is of that fusion, in bits per byte, and
against two rivals: the weights as configured, and the one best weight of the half that was learnt from. Does not know
the command line or YAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import Overrides, Weighting
from ensemble_core.errors import EvaluationError
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval
from ensemble_core.evaluation.measures import Selection
from ensemble_core.evaluation.mixture import fit_mixture, linear_shares
from ensemble_core.evaluation.offline import SharedPositions, candidates_at, fuse_positions, shared_positions
from ensemble_core.evaluation.report import aligned
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.tasks import Task
from ensemble_core.evaluation.tune import rounded, stored
from ensemble_core.evaluation.variants import Variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.fitting.gate_training import GateExamples, learn
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.evidence import Evidence
from ensemble_core.fusion.gate import GateNumbers, WeightGate
from ensemble_core.fusion.gate_store import GateOrigin

CONFIGURED, ONE, GATE = "weights as configured", "the best one weight", "gate"
NUM_GATES = 2
_BLOCK = 256  # positions whose evidence is computed at once


@dataclass(frozen=True, slots=True)
class FittedGate:
    """A gate and what it is worth. ratios: of each member and way, bits over bytes on the reported documents.

    weight: the best one weight, main first. num_positions: learnt from.
    """

    numbers: GateNumbers
    origin: GateOrigin
    members: tuple[str, ...]
    weight: tuple[float, ...]
    ratios: Mapping[str, Ratio]
    num_positions: int
    held_out: bool

    @property
    def best_member(self) -> str:
        """The better one on what is reported."""
        return min(self.members, key=lambda name: self.ratios[name].value)

    def over(self, name: str, other: str) -> Interval:
        """One way's bits over another's, less 1, with the paired interval over documents."""
        bits, reference = self.ratios[name].numerators, self.ratios[other].numerators
        found = interval(Ratio(bits, reference), draws(len(bits)))
        return Interval(found.value - 1, found.low - 1, found.high - 1)

    @property
    def is_sure(self) -> bool:
        """Whether the whole intervals of the gain on both rivals lie below 0, on documents held out."""
        return self.held_out and all(self.over(GATE, rival).high < 0 for rival in (CONFIGURED, ONE))

    @property
    def report(self) -> dict[str, object]:
        """For the artefact."""
        changes = {name: self.over(GATE, name) for name in (self.best_member, CONFIGURED, ONE)}
        shown = {
            name: [round(each.value, 5), round(each.low, 5), round(each.high, 5)] for name, each in changes.items()
        }
        bits = {name: round(ratio.value, 5) for name, ratio in self.ratios.items()}
        return {"bits per byte": bits, "gate against": shown, "positions": self.num_positions}


def fit_gate(
    bench: Workbench, ensemble: str, tasks: Sequence[Task], selection: Selection, seed: int = 0
) -> FittedGate:
    """Learn and report. Raises EvaluationError for a single member, and for tasks without shared positions."""
    if ensemble not in bench.config.ensembles:
        raise EvaluationError(f"--ensemble {ensemble!r}: no token-level ensemble has this name")
    fixed = Weighting("fixed")
    base = bench.recipe(Variant(ensemble, ensemble, Overrides(weighting=fixed)))
    if len(base.members) < 2:
        raise EvaluationError(f"--ensemble {ensemble!r}: a member alone has no weights; name an ensemble")
    if base.fusion_name == "contrastive":
        raise EvaluationError(f"--ensemble {ensemble!r}: weights have no effect on fusion contrastive")
    if lacking := [m for m, w in zip(base.members, base.weights, strict=True) if w == 0]:
        raise EvaluationError(f"--ensemble {ensemble!r}: a gate multiplies weights, and those of {lacking} are 0")
    pool = bench.recipe(
        Variant(ensemble, ensemble, Overrides(fusion="projection", mode="lockstep", weighting=fixed))
    )
    space = FusionSpace(
        [bench.vocabularies[name] for name in base.members], list, torch.device("cpu"), base.members
    )
    scores = stored(bench, base, tasks, selection)
    examples = examples_of(scores, pool, Evidence(space), bench.num_candidates)
    with torch.inference_mode(False), torch.enable_grad():
        numbers = learn(examples, base.weights, NUM_GATES, seed)
    one = rounded(fit_mixture(examples.shares.double()))
    ways = {
        CONFIGURED: base,
        ONE: replace(base, weights=one),
        GATE: replace(base, gate=WeightGate.over(space, numbers)),
    }
    ratios = _ratios(bench, base, ways, stored(bench, base, tasks, selection.other()))
    origin = GateOrigin.of(bench.config, ensemble, space)
    held_out = selection.split != "all"
    return FittedGate(numbers, origin, base.members, one, ratios, len(examples.documents), held_out)


def examples_of(scores: Scores, pool: Recipe, evidence: Evidence, num_candidates: int) -> GateExamples:
    """All scored shared positions. pool: a linear one of the members."""
    main, shared = scores.members[pool.main], shared_positions(scores, pool.members)
    kept = main.scored[shared.rows].nonzero().squeeze(1)
    if not len(kept):
        raise EvaluationError(f"{', '.join(pool.members)}: the tasks have no shared position")
    shared = SharedPositions(shared.rows[kept], [slots[kept] for slots in shared.slots])

    def probabilities(weights: tuple[float, ...]) -> Tensor:
        return fuse_positions(scores, pool, shared, num_candidates, weights).logprobs.double().exp()

    shares = linear_shares(probabilities, len(pool.members))
    assert shares is not None, "a linear pool is linear"
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(kept), _BLOCK)]
    found = [evidence.of(candidates_at(scores, pool.members, shared, block, num_candidates)) for block in blocks]
    return GateExamples(torch.cat(found), shares.float(), main.document[shared.rows].long())


def _ratios(bench: Workbench, base: Recipe, ways: Mapping[str, Recipe], scores: Scores) -> dict[str, Ratio]:
    """Bits over bytes of every member and way, on the same documents."""
    models = {name: Recipe(name, (name,), (1.0,), None, "single") for name in base.members} | dict(ways)
    kept = scores.num_bytes > 0
    found = {name: bench.sums(scores, recipe) for name, recipe in models.items()}
    return {name: Ratio(sums.bits[kept], sums.num_bytes[kept]) for name, sums in found.items()}


def told_gate(fitted: FittedGate) -> str:
    """What came of it, as a table."""
    counts = draws(len(fitted.ratios[GATE].numerators))
    rivals = (fitted.best_member, CONFIGURED, ONE)
    lines = [("model", "bits per byte", "95 % interval", "gate against it, %", "95 % interval")]
    for name, ratio in fitted.ratios.items():
        value = interval(ratio, counts)
        shown = ("", "")
        if name in rivals:
            change = fitted.over(GATE, name)
            shown = (f"{100 * change.value:+.2f}", f"{100 * change.low:+.2f} .. {100 * change.high:+.2f}")
        lines.append((name, f"{value.value:.4f}", f"{value.low:.4f} .. {value.high:.4f}", *shown))
    weights = ", ".join(f"{m} {w:g}" for m, w in zip(fitted.members, fitted.weight, strict=True))
    where = "on the half that was not learnt from" if fitted.held_out else "in sample: on all that was learnt from"
    return (
        f"{fitted.num_positions} shared positions learnt from; the best one weight there: {weights}\n"
        f"{where}:\n{aligned(lines)}"
    )

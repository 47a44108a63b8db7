"""Readings of answers as tables and as a plot: figures with intervals, and differences to the best member.

The best member is the one that does best at this very figure on these very answers, so it is the hardest to beat.
Knows counts; does not know texts or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ledger import TableRow
from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.plot import require_matplotlib
from studies.answer_metrics import (
    DISTINCT,
    ENDED,
    LOOPS,
    RIGHT,
    SIZE,
    TOKENS,
    UNKNOWN,
    AnswerCounts,
    Feature,
    Opening,
)
from studies.positions import ratio_of, told

FEATURES: Mapping[str, tuple[Feature, ...]] = {
    "questions": (RIGHT, UNKNOWN, DISTINCT, LOOPS, ENDED, TOKENS, SIZE),
    "prose": (UNKNOWN, DISTINCT, LOOPS, ENDED, TOKENS, SIZE),
}
_PANELS = (("questions", RIGHT), ("prose", UNKNOWN), ("prose", DISTINCT), ("prose", LOOPS))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everybody's answers to the same openings in the same manner. counts: label -> in the openings' order."""

    texts: str  # questions or prose
    manner: str  # greedy or sampled
    openings: Sequence[Opening]
    counts: Mapping[str, Sequence[AnswerCounts]]
    members: Sequence[str]

    def ratio(self, label: str, feature: Feature) -> Ratio:
        """One figure."""
        return ratio_of(
            [(getattr(each, feature.numerator), getattr(each, feature.denominator)) for each in self.counts[label]]
        )

    def best(self, feature: Feature) -> str:
        """The member to beat."""
        sign = 1 if feature.better == "more" else -1
        return max(self.members, key=lambda member: sign * self.ratio(member, feature).value)

    def interval(self, label: str, feature: Feature) -> Interval:
        """A figure with its interval."""
        return interval(self.ratio(label, feature), draws(len(self.openings)))

    def difference(self, label: str, feature: Feature) -> Interval | None:
        """To the best member; None for that member itself."""
        best = self.best(feature)
        if label == best:
            return None
        return paired_interval(self.ratio(label, feature), self.ratio(best, feature), draws(len(self.openings)))

    def values(self) -> list[TableRow]:
        """A row each."""
        return [
            {"answers": label}
            | {each.name: told(self.interval(label, each), each.scale) for each in FEATURES[self.texts]}
            for label in self.counts
        ]

    def differences(self) -> list[TableRow]:
        """A row each, of the figures that have a better side."""
        return [
            {"answers": label} | {each.name: self._shown(label, each) for each in self._compared()}
            for label in self.counts
        ]

    def by_kind(self, feature: Feature) -> list[TableRow]:
        """One figure, kind by kind."""
        kinds = dict.fromkeys(each.kind for each in self.openings)
        parts = {kind: self._of(kind) for kind in kinds}
        return [
            {"answers": label, "drawn": self.manner}
            | {kind: round(feature.scale * part.ratio(label, feature).value, 1) for kind, part in parts.items()}
            for label in self.counts
        ]

    def _compared(self) -> list[Feature]:
        return [each for each in FEATURES[self.texts] if each.better]

    def _shown(self, label: str, feature: Feature) -> str:
        found = self.difference(label, feature)
        return "the best member" if found is None else told(found, feature.scale)

    def _of(self, kind: str) -> Comparison:
        kept = [place for place, each in enumerate(self.openings) if each.kind == kind]
        counts = {label: [found[place] for place in kept] for label, found in self.counts.items()}
        return Comparison(self.texts, self.manner, [self.openings[place] for place in kept], counts, self.members)


def tables(comparisons: Sequence[Comparison]) -> dict[str, list[TableRow]]:
    """All of them."""
    made: dict[str, list[TableRow]] = {}
    for each in comparisons:
        made[f"{each.texts}, {each.manner}"] = each.values()
        made[f"{each.texts}, {each.manner}, against the best member"] = each.differences()
    for texts, feature in (("questions", RIGHT), ("questions", LOOPS), *_PANELS[1:]):
        of_texts = [each for each in comparisons if each.texts == texts]
        made[f"{texts}, {feature.name} by kind"] = [row for each in of_texts for row in each.by_kind(feature)]
    return made


def draw(comparisons: Sequence[Comparison], path: Path) -> None:
    """Differences to the best member with their intervals, a panel a figure, greedy and sampled apart."""
    labels = max((list(each.counts) for each in comparisons), key=len)  # who samples is everybody
    figure = require_matplotlib()(figsize=(3.2 * len(_PANELS) + 2, 0.42 * len(labels) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(_PANELS), squeeze=False, sharey=True)[0]
    for panel, (texts, feature) in zip(panels, _PANELS, strict=True):
        for rank, comparison in enumerate(each for each in comparisons if each.texts == texts):
            _mark(panel, comparison, feature, labels, rank)
        panel.axvline(0, color="0.4", lw=1)
        panel.set_title(f"{texts}: {feature.name}\n({feature.better} is better)", fontsize=9)
        panel.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize="small")
    figure.supxlabel("points against the best member, 95 % interval", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mark(panel: Any, comparison: Comparison, feature: Feature, labels: Sequence[str], rank: int) -> None:
    found = {label: comparison.difference(label, feature) for label in comparison.counts}
    kept = [(labels.index(label), each) for label, each in found.items() if each is not None]
    values = [feature.scale * each.value for _, each in kept]
    reach = [
        [feature.scale * (each.value - each.low) for _, each in kept],
        [feature.scale * (each.high - each.value) for _, each in kept],
    ]
    heights = [place + 0.3 * (rank - 0.5) for place, _ in kept]
    panel.errorbar(
        values, heights, xerr=reach, fmt="o", color=f"C{rank}", ms=4, capsize=2, label=comparison.manner
    )

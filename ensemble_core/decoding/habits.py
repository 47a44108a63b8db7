"""What a sequence's drafts have taught: how often a drafted token stays, by how certain its drafter was. No torch.

Does not know modes, members or texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Upper ends of the classes of certainty (the drafter's probability of its token), and how often such tokens stay as
# long as nothing is known of a text: a guess.
_ENDS = (0.3, 0.5, 0.7, 0.9, 1.0)
_EXPECTED = (0.5, 0.65, 0.8, 0.9, 0.98)
_OVERALL = 0.9
_PATIENCE = 8.0  # judged tokens that weigh as much as what was expected


@dataclass(frozen=True, slots=True)
class Verdict:
    """A drafted token that was judged: the drafter's probability of it, and whether it stayed."""

    certainty: float
    kept: bool


@dataclass(slots=True)
class Habits:
    """Counts of judged tokens by certainty."""

    _kept: list[float] = field(default_factory=lambda: [p * _PATIENCE for p in _EXPECTED])
    _judged: list[float] = field(default_factory=lambda: [_PATIENCE] * len(_ENDS))
    _all_kept: float = _OVERALL * _PATIENCE
    _all_judged: float = _PATIENCE

    def survival(self, certainty: float) -> float:
        """How likely a token of this certainty is to stay."""
        place = _place(certainty)
        return self._kept[place] / self._judged[place]

    @property
    def average(self) -> float:
        """How likely any token is to stay."""
        return self._all_kept / self._all_judged

    def learn(self, verdict: Verdict) -> None:
        """Take in a verdict."""
        place = _place(verdict.certainty)
        self._kept[place] += verdict.kept
        self._judged[place] += 1
        self._all_kept += verdict.kept
        self._all_judged += 1


def _place(certainty: float) -> int:
    return next((i for i, end in enumerate(_ENDS) if certainty <= end), len(_ENDS) - 1)

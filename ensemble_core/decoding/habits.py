"""How often drafted tokens stay, by how certain their drafter was of them. No torch.

What all texts of an ensemble have taught is where a sequence starts from; its own verdicts weigh more and more. This
says how far it pays to draft, never what a text becomes. Does not know modes, members or texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

# Upper ends of the classes of certainty, and how often such tokens stay as long as nothing is known. The certainty of
# a greedy token is the distance of the likeliest two, of a sampled one its probability, of a guess a tenth of the
# number of tokens that it rests on. Measured on the demo pair.
_ENDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)
_GREEDY = (0.45, 0.6, 0.75, 0.85, 0.93, 0.97, 0.99, 0.995)
_SAMPLED = (0.75, 0.78, 0.82, 0.86, 0.88, 0.9, 0.93, 0.97)
_GUESSED = (0.3, 0.3, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6)
_PATIENCE = 8.0  # judged tokens that weigh as much as what was expected
_MEMORY = 512.0  # judged tokens of a class that are remembered


Kind = Literal["greedy", "sampled", "guessed"]
_START: Mapping[Kind, Sequence[float]] = {"greedy": _GREEDY, "sampled": _SAMPLED, "guessed": _GUESSED}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A token that was judged: its drafter's certainty, whether it stayed, and whether it was a guess."""

    certainty: float
    kept: bool
    guess: bool = False


class Habits:
    """Counts of judged tokens by certainty. parent: what to expect, and whom to tell as well."""

    def __init__(self, parent: Habits | None = None, kind: Kind = "greedy") -> None:
        self._parent = parent
        self._expected = _START[kind]
        self._kept, self._judged = [0.0] * len(_ENDS), [0.0] * len(_ENDS)

    def survival(self, certainty: float) -> float:
        """How likely a token of this certainty is to stay."""
        return self._survival(_class(certainty))

    @property
    def average(self) -> float:
        """How likely any token is to stay."""
        expected = self._parent.average if self._parent is not None else 0.9
        return (sum(self._kept) + expected * _PATIENCE) / (sum(self._judged) + _PATIENCE)

    def learn(self, verdict: Verdict) -> None:
        """Take in a verdict."""
        place = _class(verdict.certainty)
        self._kept[place] += verdict.kept
        self._judged[place] += 1
        if self._judged[place] > _MEMORY:
            self._kept[place] /= 2
            self._judged[place] /= 2
        if self._parent is not None:
            self._parent.learn(verdict)

    def _survival(self, place: int) -> float:
        expected = self._parent._survival(place) if self._parent is not None else self._expected[place]
        return (self._kept[place] + expected * _PATIENCE) / (self._judged[place] + _PATIENCE)


def _class(certainty: float) -> int:
    return next((i for i, end in enumerate(_ENDS) if certainty <= end), len(_ENDS) - 1)

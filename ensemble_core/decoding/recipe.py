"""The recipe by which one model of the API answers. No torch.

Invariants: main comes first; weights sum to 1. Does not know requests, sequences or how it was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ensemble_core.fusion.base import Fusion
    from ensemble_core.fusion.gate import WeightGate


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """The name of a registered mode and its options as JSON. `modes.base.mode_of` gives the mode itself."""

    name: str = "lockstep"
    options: str = "{}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of the API answers: members (main first), their weights, how they are fused.

    mode: how steps are taken. tau: temperature of weights by perplexity (`decoding/perplexity.py`); None: they do not
    follow the prompt. gate: makes of the weights those of each place (`fusion/gate.py`); None: they are the same at
    all. on_failure: whether an assistant's failure fails the request or drops the assistant. on_full: whether a
    text that an assistant's context cannot hold drops the assistant or ends there. apart: each
    position is fused by itself, never in a batch, so that its numbers cannot depend on others. fusion_key: recipes
    with the same key fuse the same members in the same way; empty: unknown. refit: gives the same fusion over fewer
    members (main first, two or more), or None if it needs the others.
    """

    model: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    fusion: Fusion | None  # None: one member alone
    fusion_name: str
    mode: ModeChoice = ModeChoice()
    tau: float | None = None
    gate: WeightGate | None = None
    on_failure: Literal["fail", "drop"] = "fail"
    on_full: Literal["drop", "end"] = "end"
    apart: bool = False
    fusion_key: str = ""
    refit: Callable[[tuple[str, ...]], Fusion | None] | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> str:
        """The member whose vocabulary is sampled from."""
        return self.members[0]

    def can_lose(self, member: str) -> bool:
        """Whether a request goes on if this member fails. Always False for main, whose vocabulary is sampled."""
        return self.on_failure == "drop" and member != self.main

    def without(self, gone: Collection[str]) -> Recipe:
        """The same recipe without some assistants, with the remaining weights scaled to sum to 1.

        Main alone if no assistant remains, no remaining member has weight, or the fusion needs the others.
        """
        if not gone:
            return self
        left = {m: w for m, w in zip(self.members, self.weights, strict=True) if m not in gone}
        assert self.main in left, "a recipe cannot lose main"
        total, members = sum(left.values()), tuple(left)
        fusion = self.refit(members) if self.refit is not None and len(left) > 1 and total > 0.0 else None
        if fusion is None:
            return replace(
                self, members=(self.main,), weights=(1.0,), fusion=None, fusion_name="single", gate=None
            )
        gate = None if self.gate is None else self.gate.among(members)
        weights = tuple(w / total for w in left.values())
        return replace(self, members=members, weights=weights, fusion=fusion, gate=gate)

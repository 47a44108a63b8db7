"""How one model of the API answers. No torch.

Invariant: a recipe is valid: main comes first, weights sum to 1. Does not know requests, sequences or how it was
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ensemble_core.fusion.base import Fusion


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """A registered mode by its name, and its options as JSON; `modes.base.mode_of` gives the mode itself."""

    name: str = "lockstep"
    options: str = "{}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of the API answers: members (main first), their weights, how they are fused.

    mode: how steps are taken.
    tau: the weights are times what each prompt says, see `decoding/perplexity.py`; None: they are fixed.
    on_failure: what an assistant's failure does to a request. refit: the same fusion over fewer members (main first,
    two or more); None where it cannot do without the others. apart: each position is fused by itself, never in one
    batch with others, so that its numbers cannot depend on them. fusion_key: two recipes with the same one fuse the
    same members alike; empty: not known.
    """

    model: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    fusion: Fusion | None  # None: one member alone
    fusion_name: str
    mode: ModeChoice = ModeChoice()
    tau: float | None = None
    on_failure: Literal["fail", "drop"] = "fail"
    apart: bool = False
    fusion_key: str = ""
    refit: Callable[[tuple[str, ...]], Fusion | None] | None = field(default=None, compare=False, repr=False)

    @property
    def main(self) -> str:
        """The member whose vocabulary is sampled."""
        return self.members[0]

    def can_lose(self, member: str) -> bool:
        """Whether a request goes on where this member fails. Never without main, whose vocabulary decides."""
        return self.on_failure == "drop" and member != self.main

    def without(self, gone: Collection[str]) -> Recipe:
        """The same without some assistants, the weights of the others scaled to sum to 1.

        Main alone where nobody else is left, nobody left has any weight, or the fusion cannot do without them.
        """
        if not gone:
            return self
        left = {m: w for m, w in zip(self.members, self.weights, strict=True) if m not in gone}
        assert self.main in left, "nothing is left without main"
        total, members = sum(left.values()), tuple(left)
        fusion = self.refit(members) if self.refit is not None and len(left) > 1 and total > 0.0 else None
        if fusion is None:
            return replace(self, members=(self.main,), weights=(1.0,), fusion=None, fusion_name="single")
        return replace(self, members=members, weights=tuple(w / total for w in left.values()), fusion=fusion)

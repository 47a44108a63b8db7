"""Lockstep at all places of main, or at shared ones alone.

At shared places it is the rule of `verify` with drafts of one token: every step feeds all members, main chooses a
token, and the ensemble decides in its stead if the place before it is sound (`places.py`). Where that shows only with
the next token, it is decided one token late. Knows the two modes; does not know candidates, scheduling or caches.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ensemble_core.decoding.modes.base import MODES, Ask, Mode, Outcome, Turn
from ensemble_core.decoding.modes.lockstep import Lockstep
from ensemble_core.decoding.modes.verify import Verify, VerifyOptions
from ensemble_core.decoding.rhythm import Beat
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.members.base import Answers


class LockstepOptions(BaseModel):
    """Where members are fused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positions: Literal["all", "shared"] = Field(
        "all",
        description="all: after every token of main. shared: only where every member has a token boundary; "
        "elsewhere main decides alone.",
    )


@MODES.register("lockstep", LockstepOptions)
def lockstep(options: LockstepOptions) -> Mode:
    """Lockstep with these options."""
    return SharedLockstep() if options.positions == "shared" else Lockstep()


_RULE = VerifyOptions(lookup=False, needed="always", certificates=False, acceptance="common")


@dataclass(frozen=True)
class SharedLockstep:
    """See the module's docstring."""

    rule: Verify = field(default_factory=lambda: Verify(_RULE))

    def prospect(self, sequence: Sequence) -> None:
        """Every step is the same, whatever the beat."""

    def drafter(self, sequence: Sequence) -> str:
        """Main."""
        return sequence.recipe.main

    def plan(self, sequence: Sequence, beat: Beat = Beat()) -> Mapping[str, Ask]:  # noqa: B008, it is frozen
        """All members that have something to read; only assistants while a draft of main waits for them."""
        return self.rule.plan(sequence)

    def decide(self, turns: abc.Sequence[Turn], answers: Mapping[str, Answers], num_candidates: int) -> Outcome:
        """See `Mode.decide`."""
        return self.rule.decide(turns, answers, num_candidates)

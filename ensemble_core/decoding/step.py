"""One step of the engine while it is taken: what each sequence's part is, what was fed, what came back.

Plain records that feeding, modes and telemetry read; nobody here decides anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ensemble_core.decoding.modes.base import Outcome, Turn
from ensemble_core.decoding.scheduler import Share
from ensemble_core.members.base import Answers, Feed
from ensemble_core.members.parallel import Attempt


@dataclass(slots=True)
class Step:
    """What one step has done so far. Times are seconds, `started` is of time.perf_counter."""

    shares: list[Share]
    started: float = field(default_factory=time.perf_counter)
    feeds: dict[str, list[Feed]] = field(default_factory=dict)  # member -> in the order of shares
    attempts: dict[str, Attempt] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)  # sequences that decide something
    outcome: Outcome = field(default_factory=lambda: Outcome([]))
    alignment_seconds: float = 0.0
    rollbacks: dict[str, int] = field(default_factory=dict)  # member -> cached tokens that were dropped
    scoring: bool = False  # a part of a prompt is fed whose every position is answered
    scoring_seconds: float = 0.0
    num_scored: int = 0  # positions of prompts that were fused

    @property
    def answers(self) -> dict[str, Answers]:
        """Of the members whose forward went well."""
        return {name: each.answers for name, each in self.attempts.items() if each.answers is not None}

    @property
    def modes(self) -> str:
        """The modes that decide in this step, joined by `+`; that of the prompts where nothing is decided."""
        recipes = [turn.sequence.recipe for turn in self.turns] or [share.sequence.recipe for share in self.shares]
        return "+".join(sorted({recipe.mode.name for recipe in recipes}))

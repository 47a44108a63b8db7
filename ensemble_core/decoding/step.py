"""The record of one engine step in progress: each sequence's share, what was fed, and what came back.

A plain record that the engine and feeding fill and telemetry reads. Decides nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ensemble_core.decoding.modes.base import Outcome, Turn
from ensemble_core.decoding.shares import Share
from ensemble_core.members.base import Answers, Feed
from ensemble_core.members.parallel import Attempt
from ensemble_core.stats import MIXED


@dataclass(slots=True)
class Step:
    """What one step has done so far. Times are seconds; `started` is from time.perf_counter."""

    shares: list[Share]
    started: float = field(default_factory=time.perf_counter)
    feeds: dict[str, list[Feed]] = field(default_factory=dict)  # member -> in the order of shares
    attempts: dict[str, Attempt] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)  # deciding sequences
    outcome: Outcome = field(default_factory=lambda: Outcome([]))
    alignment_seconds: float = 0.0
    rollbacks: dict[str, int] = field(default_factory=dict)  # member -> cached tokens that were dropped
    scoring: bool = False  # a chunk of a scored or weighed prompt is fed
    scoring_seconds: float = 0.0
    num_scored: int = 0  # positions of prompts that were fused

    @property
    def answers(self) -> dict[str, Answers]:
        """Answers of the members whose forward succeeded."""
        return {name: each.answers for name, each in self.attempts.items() if each.answers is not None}

    @property
    def mode(self) -> str:
        """The mode of the deciding sequences, or of all if none decides; MIXED if there are several."""
        recipes = [turn.sequence.recipe for turn in self.turns] or [share.sequence.recipe for share in self.shares]
        first, *others = {recipe.mode.name for recipe in recipes}
        return MIXED if others else first

"""One request in flight: its recipe, its text, its tokens in every member. No torch.

Invariants: main's track comes first and holds the sampled tokens; every other track spells the same text. A
sequence does not know pages, steps or the other sequences.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from ensemble_core.decoding.requests import FinishReason, GenerationRequest, Output
from ensemble_core.text.alignment import Track
from ensemble_core.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from ensemble_core.fusion.base import Fusion


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model of the API answers: members (main first), their weights, how they are fused."""

    model: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    fusion: Fusion | None  # None: one member alone
    fusion_name: str
    mode: str = "lockstep"

    @property
    def main(self) -> str:
        """The member whose vocabulary is sampled."""
        return self.members[0]


class Phase(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in flight."""

    seq_id: int
    request: GenerationRequest
    recipe: Recipe
    tracks: dict[str, Track]  # main first
    detokenizer: Detokenizer
    phase: Phase = Phase.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    last_words: tuple[str, tuple[int, ...]] = ("", ())  # text and tokens that go out with the end
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.request.params.seed)  # seed None: from the system

    @property
    def main(self) -> Track:
        """The main member's tokens."""
        return self.tracks[self.recipe.main]

    @property
    def num_completion_tokens(self) -> int:
        """Main's tokens so far, a stop token included."""
        return len(self.main.completion_ids)

    @property
    def consulted(self) -> tuple[str, ...]:
        """The members that answer next: main alone while the last character is incomplete."""
        if self.detokenizer.mid_character:
            return self.recipe.members[:1]
        return self.recipe.members

    def append(self, token_id: int) -> str:
        """Take in a decided token; the text that can be shown now. May finish the sequence."""
        self.phase = Phase.DECODE
        self.main.append(token_id)
        vocabulary = self.main.vocabulary
        shown = self.detokenizer.feed(vocabulary.text_bytes(token_id))
        if self.detokenizer.stop is not None:
            self.finish("stop", stop=self.detokenizer.stop)
        elif token_id in vocabulary.stop_ids:
            self.finish("stop")
        elif self.num_completion_tokens >= self.request.params.max_tokens:
            self.finish("length")
        return shown

    def flush(self) -> str:
        """What was held back, at the end; a stop string that this completes is still cut."""
        rest = self.detokenizer.flush()
        if self.detokenizer.stop is not None and self.finish_reason == "length":
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop
        return rest

    def output(self, text: str, token_ids: tuple[int, ...]) -> Output:
        """News of this sequence as it stands."""
        return Output(
            text=text,
            token_ids=token_ids,
            num_prompt_tokens=len(self.main.prompt_ids),
            num_completion_tokens=self.num_completion_tokens,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def finish(self, reason: FinishReason, stop: str | int | None = None, error: str | None = None) -> None:
        """The end; the scheduler takes it off its lists at the next turn."""
        self.phase, self.finish_reason, self.stop_reason, self.error = Phase.FINISHED, reason, stop, error

"""Metrics of the engine as plain records. Floor 0: no torch, no Prometheus.

The engine fills these records and passes each to `record(stats)`. `server/edge/metrics.py` turns them into Prometheus
metrics; tests collect them in a list. All durations are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

StepPhase = Literal["prefill", "decode"]
MIXED = "mixed"  # the mode of a step whose sequences have several
# How a member fails; lost: it lives elsewhere, and cannot be reached or has lost its cache.
Cause = Literal["exception", "non_finite", "timeout", "lost"]
# Why a member is left out: its failure; busy: an earlier call has not returned; idle: the fusion cannot use it
# without another member that was lost; full: the text has become too long for its context; unloaded: it was taken
# away by force.
Reason = Literal["exception", "non_finite", "timeout", "lost", "busy", "idle", "full", "unloaded"]


@dataclass(frozen=True, slots=True)
class MemberStats:
    """What one member did in one step."""

    member: str
    phase: StepPhase  # "prefill" if any of its feeds is part of a prompt
    forward_seconds: float
    wait_seconds: float  # from the end of its forward until the slowest member of the step was done
    prefill_tokens: int
    decode_tokens: int
    rollback_tokens: int


@dataclass(frozen=True, slots=True)
class FusionStats:
    """One fused group of rows (sequences of one recipe) in one step."""

    model: str
    fusion: str
    seconds: float
    unmapped: dict[str, list[float]]  # member -> mass per row that has no place in main's vocabulary
    agreed: dict[str, tuple[int, int]]  # member -> rows whose top token (has, has not) the chosen one's bytes
    overruled: int  # rows where the chosen token is not main's likeliest


@dataclass(frozen=True, slots=True)
class DraftStats:
    """How the drafts of a model's sequences fared in one step, and how their final tokens were decided."""

    model: str
    drafted: int  # tokens that were decided after main had drafted them
    accepted: int  # of these, those that stayed
    guessed: int  # guesses that main was fed, up to the first wrong one
    confirmed: int  # of these, those that main chose itself
    consulted: int  # final tokens that a fusion decided
    agreed: int  # those that the assistants' consent decided
    certified: int  # those that no assistant could have changed
    alone: int  # those that main decided alone


@dataclass(frozen=True, slots=True)
class DrawStats:
    """From whose distributions a model's final tokens were drawn in one step, in a mode that draws one member."""

    model: str
    drawn: dict[str, int]  # member -> tokens


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine."""

    mode: str
    batch_size: int  # sequences that got at least one token
    seconds: float
    alignment_seconds: float
    sampling_seconds: float
    members: list[MemberStats] = field(default_factory=list)
    fusions: list[FusionStats] = field(default_factory=list)

    @property
    def forwards_seconds(self) -> float:
        """From the start of the first forward to the end of the last; less than their sum where they overlap."""
        return max((each.forward_seconds + each.wait_seconds for each in self.members), default=0.0)


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One request that has ended (one choice of one prompt)."""

    model: str
    finish_reason: str  # stop | length | tool_calls | abort | error
    prompt_tokens: int
    generation_tokens: int
    queue_seconds: float
    ttft_seconds: float | None  # None: the request ended before its first token
    e2e_seconds: float


@dataclass(frozen=True, slots=True)
class TokenStats:
    """The gap between two steps that gave a sequence tokens."""

    model: str
    inter_token_seconds: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One member's cache and memory, when it was read."""

    member: str
    used_pages: int
    num_pages: int
    memory_bytes: dict[str, int]  # device -> bytes of weights and cache


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Prompt tokens of one sequence that a member already had cached."""

    member: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class HealthStats:
    """One member failed in a step, in a whole call or in some rows. failure None: it works again."""

    member: str
    failure: Cause | None


@dataclass(frozen=True, slots=True)
class DropStats:
    """One request goes on without one of its members."""

    model: str
    member: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class PreemptionStats:
    """One sequence went back to the queue: a member's cache was full, or a request with no place got its own."""

    model: str


@dataclass(frozen=True, slots=True)
class CouncilStats:
    """One answer of a council, from its first call to its last token."""

    model: str
    served_by: str
    rounds: int
    agreement: float | None  # share of the votes that the answer has; None: nobody voted
    seconds: float
    calls: tuple[str, ...]  # the model of each call; those of a council within another count there


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How many sequences run and wait."""

    num_running: int
    num_waiting: int


Stats = (
    StepStats
    | RequestStats
    | TokenStats
    | CacheStats
    | PrefixStats
    | HealthStats
    | DropStats
    | PreemptionStats
    | DraftStats
    | DrawStats
    | QueueStats
    | CouncilStats
)
# Receives one record. Called from the engine's thread; must be quick and must not raise.
Record = Callable[[Stats], None]


def discard(stats: Stats) -> None:
    """A `Record` that ignores everything."""

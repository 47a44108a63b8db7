"""Plain numbers that the engine hands out; floor 0, no torch, no Prometheus.

The engine fills these records and gives them to a `StatsSink`. `server/edge/metrics.py` is the sink that knows
Prometheus; tests use a list. All durations are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

Phase = Literal["prefill", "decode"]
Cause = Literal["exception", "non_finite", "timeout"]  # how a member fails
# Why a member is left out: its failure; busy: an earlier forward has not come back; idle: the fusion has no use for
# it without another one that failed.
Reason = Literal["exception", "non_finite", "timeout", "busy", "idle"]


@dataclass(frozen=True, slots=True)
class MemberStats:
    """What one member did in one step."""

    member: str
    phase: Phase  # "prefill" as soon as one of its feeds is a part of a prompt
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
    unmapped: dict[str, list[float]]  # member -> mass per row that found no place in main's vocabulary
    agreed: dict[str, tuple[int, int]]  # member -> rows whose top token (has, has not) the bytes of the chosen
    overruled: int  # rows where the chosen token is not main's own likeliest


@dataclass(frozen=True, slots=True)
class StepStats:
    """One turn of the engine's loop."""

    mode: str
    batch_size: int  # sequences that got a token
    seconds: float
    alignment_seconds: float
    sampling_seconds: float
    members: list[MemberStats] = field(default_factory=list)
    fusions: list[FusionStats] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One finished request (one choice of one prompt)."""

    model: str
    finish_reason: str  # stop | length | abort | error
    prompt_tokens: int
    generation_tokens: int
    queue_seconds: float
    ttft_seconds: float | None  # None: it ended before its first token
    e2e_seconds: float


@dataclass(frozen=True, slots=True)
class TokenStats:
    """One token that reached a stream: the gap to the one before it."""

    model: str
    inter_token_seconds: float


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One member's cache and memory, read when somebody asks."""

    member: str
    used_pages: int
    num_pages: int
    memory_bytes: dict[str, int]  # device -> bytes of weights and cache


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Prompt tokens of one sequence that a member had cached already."""

    member: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class HealthStats:
    """One member's forward failed as a whole or in some rows; failure None: it works again."""

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
    """One sequence went back to the queue, since a member's cache was full."""

    model: str


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How many sequences run and wait."""

    num_running: int
    num_waiting: int


class StatsSink(Protocol):
    """Where numbers go. Called from the engine's thread; must be quick and must not raise."""

    def step(self, stats: StepStats) -> None:
        """Take in one step."""

    def token(self, stats: TokenStats) -> None:
        """Take in one emitted token."""

    def request(self, stats: RequestStats) -> None:
        """Take in one finished request."""

    def queue(self, stats: QueueStats) -> None:
        """Take in the lengths of the queues."""

    def cache(self, stats: CacheStats) -> None:
        """Take in one member's cache usage."""

    def prefix(self, stats: PrefixStats) -> None:
        """Take in one reused prefix."""

    def health(self, stats: HealthStats) -> None:
        """Take in one member's failure or recovery."""

    def drop(self, stats: DropStats) -> None:
        """Take in one request's loss of a member."""

    def preemption(self, stats: PreemptionStats) -> None:
        """Take in one preemption."""


class NullSink:
    """Drops everything; the offline API uses it."""

    def step(self, stats: StepStats) -> None:
        """Drop it."""

    def token(self, stats: TokenStats) -> None:
        """Drop it."""

    def request(self, stats: RequestStats) -> None:
        """Drop it."""

    def queue(self, stats: QueueStats) -> None:
        """Drop it."""

    def cache(self, stats: CacheStats) -> None:
        """Drop it."""

    def prefix(self, stats: PrefixStats) -> None:
        """Drop it."""

    def health(self, stats: HealthStats) -> None:
        """Drop it."""

    def drop(self, stats: DropStats) -> None:
        """Drop it."""

    def preemption(self, stats: PreemptionStats) -> None:
        """Drop it."""

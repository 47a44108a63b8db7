"""What clients may use up: connections, time, memory, and what a request may choose of its ensemble. No torch.

The defaults suit a server that strangers can reach. Does not know how a limit is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from ensemble_core.section import Section, Size


class LimitsConfig(Section):
    """Limits of connections and bodies. Times are in seconds."""

    connections: int = Field(
        512,
        ge=1,
        description="Open connections; above it the oldest silent one is closed, or the new one gets a 503.",
    )
    header_bytes: Size = Field(32 * 2**10, ge=1024, description="Request line and headers; more get a 431.")
    header_seconds: float = Field(
        10.0, gt=0.0, description="From a connection's or a request's first moment to the end of its headers."
    )
    body_seconds: float = Field(30.0, gt=0.0, description="To receive a body; a slower one gets a 408.")
    body_memory: Size = Field(
        64 * 2**20, ge=1024, description="All bodies that are being received, together; one more gets a 503."
    )
    body_values: int = Field(
        300_000, ge=1000, description="JSON values in a body, counted as commas and opening brackets."
    )
    messages: int = Field(1024, ge=1, description="Messages of a conversation, and parts of a message.")
    write_seconds: float = Field(30.0, gt=0.0, description="A client that reads nothing for so long is cut off.")
    stream_buffer: Size = Field(
        2**20, ge=1024, description="Output that waits for one slow reader; beyond it the stream ends."
    )
    request_seconds: float = Field(1800.0, gt=0.0, description="From arrival to the last token; then it ends.")
    files: int = Field(100, ge=1, description="Files, and batches, that are kept for each API key.")
    file_bytes: Size = Field(100 * 2**20, ge=1024, description="One uploaded file; a larger one gets a 413.")
    file_seconds: float = Field(300.0, gt=0.0, description="To receive an uploaded file; a slower one gets a 408.")
    batch_lines: int = Field(50_000, ge=1, description="Requests of one batch.")
    batch_share: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="Batches begin a request only while fewer than this share of scheduler.max_running are open.",
    )
    keep_alive_seconds: float = Field(
        75.0, gt=0.0, description="An idle connection is closed after this; keep it above a proxy's own time."
    )


class OverridesConfig(Section):
    """What a request may choose under `ensemble`. What the recipe itself is configured with is always allowed."""

    fusions: tuple[str, ...] | Literal["all"] = Field("all", description="Names of fusions, or all.")
    modes: tuple[str, ...] | Literal["all"] = Field("all", description="Names of modes, or all.")
    most: Mapping[str, float] = Field(
        default_factory=lambda: {"steps": 10}, description="Option -> the largest number that a request may give."
    )
    refused: Mapping[str, tuple[Any, ...]] = Field(
        default_factory=lambda: {"support": ("full",)}, description="Option -> values that a request may not give."
    )

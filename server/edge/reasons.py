"""Why HTTP requests are refused: the values of a metric's label, all known before the first refusal."""

from __future__ import annotations

REASONS = (
    "invalid_request", "model_not_found", "unauthorized", "body_too_large", "body_too_slow", "busy", "queue_full",
    "not_ready", "timeout", "failed",
)  # fmt: skip

"""The access log: one record for each request, once its answer has ended.

No prompt, no text, no path: routes appear as templates, models only once the engine has accepted the request. Probes
are at debug. Does not know how records are written.
"""

from __future__ import annotations

import logging

from server.edge.exchange import Exchange
from server.edge.logs import fields

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/ready", "/metrics"})
_MILLI = 3  # digits of seconds


def log_access(exchange: Exchange) -> None:
    """Log the exchange: as text `METHOD ROUTE STATUS name=value...`, as JSON each value under its name.

    bytes: of the body sent. seconds: from the request's head to the end of the answer. first_byte: seconds to the
    first byte of the body. id: of the completion, which the engine's lines name.
    """
    level = logging.DEBUG if exchange.route in PROBES else logging.INFO
    if not logger.isEnabledFor(level):
        return
    head = {"method": exchange.method, "route": exchange.route or "-", "status": exchange.status or "-"}
    rest = {name: value for name, value in _details(exchange).items() if value is not None}
    message = " ".join([*map(str, head.values()), *(f"{name}={value}" for name, value in rest.items())])
    logger.log(level, "%s", message, extra=fields(**head, **rest))


def _details(exchange: Exchange) -> dict[str, object]:
    generation = exchange.generation
    return {
        "bytes": exchange.num_bytes,
        "seconds": _rounded(exchange.seconds(exchange.ended)),
        "first_byte": _rounded(exchange.seconds(exchange.first_byte)),
        "model": generation and generation.model,
        "id": generation and generation.id,
        "prompt_tokens": generation and sum(generation.counts.prompts.values()),
        "completion_tokens": generation and sum(generation.counts.completions.values()),
        "error": exchange.error,
        "disconnected": exchange.disconnected or None,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, _MILLI)

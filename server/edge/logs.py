"""Log lines: one format, with the request's id in every line.

The id is in a context variable, so code that serves a request need not pass it on. The engine's thread serves many
requests at once and has no such id; its lines name the requests in their messages.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")

_FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"
_OURS = ("server", "ensemble_core")


class RequestIdFilter(logging.Filter):
    """Gives every record a `request_id`; drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the id. Always true."""
        record.request_id = REQUEST_ID.get()
        return True


def configure(level: str) -> None:
    """Log to stderr: our loggers at `level`, the HTTP server's at info, all others at warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(RequestIdFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    for name in _OURS:
        logging.getLogger(name).setLevel(level.upper())

"""Whether a member that lives elsewhere can be reached, and the thread that keeps looking.

Invariant: what `lost` says is what the log said last. Does not know how one looks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ensemble_core.errors import MemberLostError

logger = logging.getLogger(__name__)


class Presence:
    """Up, or lost for a reason."""

    def __init__(self, name: str, look: Callable[[], None], interval: float) -> None:
        """look: called in a thread of its own every `interval` seconds, whether the member is lost or not."""
        self._name, self._look, self._interval = name, look, interval
        self.lost: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"presence-{name}", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()

    @property
    def closing(self) -> threading.Event:
        """Set once nobody looks any more."""
        return self._closing

    def require(self) -> None:
        """Raise MemberLostError where the member is lost."""
        if (reason := self.lost) is not None:
            raise MemberLostError(self._name, reason)

    def lose(self, reason: str) -> None:
        """It cannot be reached any more."""
        if self.lost is None and not self._closing.is_set():
            logger.error("member %s is lost: %s", self._name, reason)
        self.lost = reason

    def find(self, how: str) -> None:
        """It can be reached again."""
        if self.lost is not None:
            logger.warning("member %s is back: %s", self._name, how)
        self.lost = None

    def _watch(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self._look()
            except Exception:  # a look that fails is not the end of looking
                logger.exception("looking for member %s failed", self._name)

"""The line to a far end: one request at a time, and its reply. Bytes both ways, never pickled objects.

A reply begins with one byte that says what it is (`Tag`). Knows neither feeds nor members.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, Protocol

Method = Literal["pulse", "forward", "reuse"]


class Tag(IntEnum):
    """What a reply is; all but DONE carry a message for people."""

    DONE = 0
    FAILED = 1  # the member raised
    LOST = 2  # the far end does not hold what the order expects
    GARBLED = 3  # the order cannot be read


class LinkError(Exception):
    """The far end is gone. Says how that was noticed."""


class Link(Protocol):
    """One incarnation of a far end."""

    def send(self, method: Method, message: bytes) -> None:
        """Begin a request. The reply to the one before must have been received. Raises LinkError."""

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The reply, or None where it has not come within `timeout` seconds. Raises LinkError."""

    def close(self) -> None:
        """End the far end; it may be gone already."""

"""Bytes in, text out: whole UTF-8 characters, stop strings cut and held back.

Invariants: what `feed` and `flush` return concatenates to the final text, whatever the pieces that bytes came
in; no part of a stop string is ever returned; at most max(len(stop)) - 1 characters are held back. Where several
stop strings match, the one that is complete first wins, of two complete at once the longer: so the result does
not depend on token boundaries. Bytes that are no UTF-8 become U+FFFD. Knows no tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """One sequence's text so far.

    text: all whole characters so far, held-back ones included; cut before a stop string once one is found.
    stop: the stop string that ended the text, if one did.
    """

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.text = ""
        self.stop: str | None = None
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._include_stop = include_stop
        self._released = 0
        self._unarmed = 0  # stop strings that begin before this character do not count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def mid_character(self) -> bool:
        """True while the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    def feed(self, data: bytes, *, armed: bool = True) -> str:
        """Take in bytes; the characters that can be shown now. Unarmed, no stop string ends in them or before."""
        more = self._decoder.decode(data)
        if not armed:
            self._unarmed = len(self.text) + len(more)
        return self._grow(more)

    def flush(self) -> str:
        """The end: everything held back; an incomplete character becomes U+FFFD."""
        shown = self._grow(self._decoder.decode(b"", final=True))
        return shown + self._release(len(self.text))

    def _grow(self, more: str) -> str:
        if self.stop is not None or not more:
            return ""
        start = max(self._unarmed, len(self.text) - self._longest + 1, 0)
        self.text += more
        found = _first_stop(self.text, start, self._stops)
        if found is None:
            return self._release(len(self.text) - self._num_held())
        position, self.stop = found
        position += len(self.stop) if self._include_stop else 0
        self.text = self.text[:position]
        return self._release(position)

    def _release(self, until: int) -> str:
        shown = self.text[self._released : until]
        self._released = max(self._released, until)
        return shown

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text) - self._unarmed), 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def _first_stop(text: str, start: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first completed stop string begins, and which it is."""
    matches = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    if not matches:
        return None
    _, at, stop = min(matches)
    return at, stop

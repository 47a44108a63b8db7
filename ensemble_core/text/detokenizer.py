"""Bytes in, text out: whole UTF-8 characters, stop strings cut and held back.

Invariants: what `feed` and `flush` return concatenates to the final text, whatever the pieces that bytes came
in; no part of a stop string is ever returned; at most max(len(stop)) - 1 characters are held back. Where several
stop strings match, the one that is complete first wins, of two complete at once the longer: so the result does
not depend on token boundaries. Bytes that are no UTF-8 become U+FFFD. Knows no tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ensemble_core.text.stops import StopState
from ensemble_core.text.tools import CallPiece


class Detokenizer:
    """One sequence's text so far.

    text: all whole characters so far, held-back ones included; cut before a stop string once one is found.
    stop: the stop string that ended the text, if one did. called: calls of tools have begun (`shown.AnswerText`).
    """

    called = False

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.text = ""
        self.stop: str | None = None
        self._beginning = StopState(stops) if stops else None
        self._ending = self._beginning  # what the text ends in that may become a stop string
        self._include_stop = include_stop
        self._released = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def mid_character(self) -> bool:
        """True while the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    @property
    def num_reasoning(self) -> int | None:
        """Tokens of reasoning so far; None: a text alone can have none."""
        return None

    def foresee(self, data: bytes) -> tuple[str, bool]:
        """What the text would be with `data` behind it, in whole characters; and whether it would end within one."""
        if not data:
            return self.text, self.mid_character
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate(self._decoder.getstate())
        return self.text + decoder.decode(data), bool(decoder.getstate()[0])

    def feed(self, data: bytes, *, armed: bool = True) -> str:
        """Take in bytes; the characters that can be shown now. Unarmed, no stop string ends in them or before."""
        more = self._decoder.decode(data)
        if not armed:
            self._ending = self._beginning
        return self._grow(more, armed)

    def flush(self) -> str:
        """The end: everything held back; an incomplete character becomes U+FFFD."""
        shown = self._grow(self._decoder.decode(b"", final=True))
        return shown + self._release(len(self.text))

    def take_calls(self) -> tuple[CallPiece, ...]:
        """News of calls since the last time; a text alone has none."""
        return ()

    def take_reasoning(self) -> str:
        """Reasoning since the last time; a text alone has none."""
        return ""

    def release(self) -> str:
        """Everything held back, which the text that follows does not continue: no stop string ends in both."""
        self._ending = self._beginning
        return "" if self.stop is not None else self._release(len(self.text))

    def _grow(self, more: str, armed: bool = True) -> str:
        if self.stop is not None or not more:
            return ""
        start, self.text = len(self.text), self.text + more
        if self._ending is None:
            return self._release(len(self.text))
        for end, char in enumerate(more if armed else "", start + 1):
            self._ending = self._ending.step(char)
            if self._ending.match is not None:
                return self._cut(self._ending.match, end)
        return self._release(len(self.text) - self._ending.depth)

    def _cut(self, stop: str, end: int) -> str:
        """End the text with the stop string that is complete at `end`, or before it."""
        self.stop = stop
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return self._release(len(self.text))

    def _release(self, until: int) -> str:
        shown = self.text[self._released : until]
        self._released = max(self._released, until)
        return shown

"""Calls in a text that grows: what a client sees of it, as content and as pieces of calls.

Invariant: what comes out joins to the same content and calls, whatever the pieces that the text came in. Text that
may become the marker of a call is held back, with the white space before it, which belongs to the call's layout.
Knows a form, no vocabularies.
"""

from __future__ import annotations

import uuid
from collections.abc import Generator
from itertools import count

from ensemble_core.text.call_forms import CallForm
from ensemble_core.text.markers import shown_before
from ensemble_core.text.tools import CallPiece, merged

_Reading = Generator[None, str]  # takes one character at a time


class CallReader:
    """Splits a text that follows a form's grammar. called: a call has begun, its name is known."""

    def __init__(self, form: CallForm) -> None:
        self._form = form
        self._held: str | None = ""  # the end of the content that is not shown; None: calls have begun
        self._fresh = True  # nothing has been shown
        self._pieces: list[CallPiece] = []
        self._reading: _Reading = self._calls()
        next(self._reading)

    @property
    def in_calls(self) -> bool:
        """Whether the marker of calls has come."""
        return self._held is None

    def feed(self, more: str) -> tuple[str, list[CallPiece]]:
        """Take in text; the content and the pieces of calls that can be shown now."""
        content = ""
        if self._held is not None:
            content, more = self._split(self._held + more)
        if self.in_calls:
            for char in more:
                self._reading.send(char)
        pieces, self._pieces = self._pieces, []
        return content, merged(pieces)

    def end(self) -> str:
        """The content that was held back, where no call came of it; none where it began a marker that must come."""
        held = "" if self._form.alone else self._held or ""
        if held:
            self._held = ""
        return held

    def _split(self, text: str) -> tuple[str, str]:
        """(content to show now, text of calls). Holds back the rest."""
        opening = self._form.opening
        at = text.find(opening) if not self._form.at_start else (0 if self._fresh else len(text))
        if at >= 0 and text.startswith(opening, at):
            self._held = None
            return text[:at].rstrip(), text[at + len(opening) :]
        shown = self._shown(text)
        self._held = text[shown:]
        self._fresh = self._fresh and not shown
        return text[:shown], ""

    def _shown(self, text: str) -> int:
        """How many characters can be shown: all that cannot belong to the marker and the layout before it."""
        opening = self._form.opening
        if self._form.at_start:
            return 0 if self._fresh and opening.startswith(text) else len(text)
        return shown_before(text, opening)

    def _calls(self) -> _Reading:
        form = self._form
        yield from _skip(form.first)
        for index in count():
            yield from _skip(form.before)
            name = yield from _until(form.middle)
            self._pieces.append(CallPiece(index, "", name, f"call_{uuid.uuid4().hex[:24]}"))
            yield from _skip(form.middle[1:])
            yield from self._arguments(index)
            yield from _skip(form.after)
            yield from _skip(form.between or "")

    def _arguments(self, index: int) -> _Reading:
        """A JSON object, character by character, to the brace that closes it."""
        depth, quoted, escaped = 0, False, False
        while True:
            char = yield
            self._pieces.append(CallPiece(index, char))
            if quoted:
                quoted = escaped or char != '"'
                escaped = char == "\\" and not escaped
                continue
            quoted = char == '"'
            depth += (char in "{[") - (char in "}]")
            if depth == 0:
                return


def _skip(text: str) -> _Reading:
    """Pass over a known text. Of the last between or after, what does not come is never missed."""
    for _ in text:
        yield


def _until(text: str) -> Generator[None, str, str]:
    """The characters before a known text, whose first character they never have; that one is taken, too."""
    found = ""
    while (char := (yield)) != text[0]:
        found += char
    return found

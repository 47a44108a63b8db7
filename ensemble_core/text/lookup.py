"""What followed the last tokens of a text when they occurred before: guesses that cost no forward.

The idea of prompt lookup, as vLLM's n-gram speculation has it: texts repeat names, phrases and code. Knows token ids
only.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (3, 2)  # tokens that must have occurred before, the longest first
_BITE = 4096  # tokens taken in by one call, so that a long prompt stalls nobody


class Lookup:
    """The places of every pair and triple of tokens in a text that only grows at its end."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where they ended last, with something behind them

    def __len__(self) -> int:
        return len(self._ids)

    def grow(self, more: Sequence[int]) -> None:
        """Take in the text's next tokens, not all at once if they are many: see `len`."""
        for token_id in more[:_BITE]:
            for length in _LENGTHS:
                if len(self._ids) >= length:
                    self._after[tuple(self._ids[-length:])] = len(self._ids)
            self._ids.append(token_id)

    def guess(self, end: Sequence[int], count: int) -> tuple[int, Sequence[int]]:
        """How many of the tokens at the `end` of the text occurred before, and up to `count` that followed them."""
        for length in _LENGTHS:
            place = self._after.get(tuple(end[-length:])) if len(end) >= length else None
            if place is not None:
                return length, self._ids[place : place + count]
        return 0, ()

"""A marker in a text that grows: how much of the text before it can be shown while it may still come.

Knows strings alone.
"""

from __future__ import annotations


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may begin the marker, which the text does not hold."""
    longest = min(len(marker) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)


def shown_before(text: str, marker: str) -> int:
    """How many characters can be shown: all that cannot belong to the marker and the white space before it."""
    return len(text[: len(text) - overlap(text, marker)].rstrip())

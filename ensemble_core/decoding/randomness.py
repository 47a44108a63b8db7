"""Where a sequence's random numbers come from. Knows seeds alone."""

from __future__ import annotations

import random

_LONG = 1 << 96  # makes four words of a seed


def generator(seed: int | None) -> random.Random:
    """A stream of its own for every seed from -2^63 to 2^63 - 1; one from the system for None.

    `random.Random` takes the absolute value of a seed. And some seeds of several 32-bit words have the stream of a
    shorter one (2^32 + 2 that of 2): it adds each word to its place, so the words a, a - 1, a - 2, ... are read as a
    alone. So a seed of more than one word is made four words that never run down like this: low, high, 0, 1.
    """
    if seed is None or 0 <= seed < 2**32:
        return random.Random(seed)
    return random.Random(seed % 2**64 + _LONG)

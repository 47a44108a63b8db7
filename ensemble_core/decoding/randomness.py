"""Seeded random number generators for sequences. Knows only seeds."""

from __future__ import annotations

import random

_LONG = 1 << 96  # makes a seed four words long


def generator(seed: int | None) -> random.Random:
    """A generator with a distinct stream for each seed from -2^63 to 2^63 - 1; None: seeded by the system.

    `random.Random` takes the absolute value of a seed. Also, some seeds of several 32-bit words have the same stream
    as a shorter one (2^32 + 2 and 2): the position of each word is added to it, so the words a, a - 1, a - 2, ...
    read like a alone. So a longer seed becomes four words that never fall like this: low, high, 0, 1.
    """
    if seed is None or 0 <= seed < 2**32:
        return random.Random(seed)
    return random.Random(seed % 2**64 + _LONG)

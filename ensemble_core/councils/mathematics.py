"""Whether two texts end with the same mathematical answer, by math-verify. Runs in a process of its own.

A text may hold an expression that keeps a computer algebra system busy for ever (9^9^9^9), so whoever calls this sets
a limit and ends the process; see `reading`. Knows texts alone, and imports math-verify where it is first needed.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

_LONGEST = 8_000  # characters; an answer stands at the end
_SOFT_LIMIT = 1  # second for one reading or comparison; math-verify gives up by itself where Python runs
_PATIENCE = 3.0  # seconds for all comparisons of one text
_MEMORY = 2 * 2**30  # bytes of address space


class MathAnswer(NamedTuple):
    """rank: of the first text before that has the same answer; None: none has. shown: for people to read."""

    rank: int | None
    shown: str


def is_installed() -> bool:
    """Whether math-verify is there."""
    return find_spec("math_verify") is not None


def compared(text: str, known: Sequence[str]) -> MathAnswer | None:
    """The answer that a text ends with, compared with those of other texts; None: it has none."""
    _confine()
    own = _parsed(text)
    if not own:
        return None
    began = time.perf_counter()
    for rank, other in enumerate(known):
        if time.perf_counter() - began > _PATIENCE:
            break
        if _are_equal(_parsed(other), own):
            return MathAnswer(rank, str(own[-1]))
    return MathAnswer(None, str(own[-1]))


@lru_cache(512)
def _parsed(text: str) -> tuple[Any, ...]:
    """What math-verify finds: an expression and its text, or nothing."""
    from math_verify import parse

    return tuple(parse(text[-_LONGEST:], parsing_timeout=_SOFT_LIMIT))


def _are_equal(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Either way round, since math-verify's comparison takes one side as the truth."""
    from math_verify import verify

    return bool(
        verify(list(left), list(right), timeout_seconds=_SOFT_LIMIT)
        or verify(list(right), list(left), timeout_seconds=_SOFT_LIMIT)
    )


@cache
def _confine() -> None:
    """Bound what this process may allocate; its warnings would go to the server's terminal."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))

"""What a member says of a string: the mass of all token sequences that cover it (Phan et al., arXiv 2410.09303).

A cover of a string x is a token sequence whose symbols begin with x and whose last token is needed for it: all other
tokens lie strictly inside x. P(x) is the sum over covers, and P(b | x) = P(xb) / P(x). A cover whose last token ends
with x *ends* it; the others run over its end. Covers that leave a member's own spelling cost a forward each, so a sum
may follow its own spelling alone: then it holds, for each boundary of that spelling before the end of x, every single
token from there to the end of x or past it. What is left out lies on other tokens strictly inside x, and is bounded.

Symbols are bytes, or tokens of a common vocabulary (`reductions.py`). Knows log-probabilities; does not know texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from studies.reductions import Reduction, Symbols

Next = Callable[[tuple[int, ...]], Tensor]  # ids since the beginning of the string -> (V,) log-probabilities
Follows = Callable[[tuple[int, ...], float], bool]  # ids, their mass -> whether covers that begin so are summed
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Covered:
    """begun: of all covers; ended: of those that end the string; missed: the most that either lacks."""

    begun: float
    ended: float
    missed: float
    forwards: int


def covered(next_logprobs: Next, reduction: Reduction, path: Symbols, follows: Follows) -> Covered:
    """The covers of `path`, summed as far as `follows` allows."""
    return _covered(next_logprobs, reduction, path, follows, (), 1.0)


def _covered(
    next_logprobs: Next, reduction: Reduction, path: Symbols, follows: Follows, ids: tuple[int, ...], mass: float
) -> Covered:
    row = next_logprobs(ids).double().exp()[reduction.order]
    within, whole = reduction.beginning(path), reduction.spelling(path)
    begun, ended = mass * float(row[within].sum()), mass * float(row[whole].sum())
    missed, forwards = 0.0, 1
    for place in inner(reduction, path):
        further = (*ids, int(reduction.order[place]))
        own = mass * float(row[place])
        if not follows(further, own):
            missed += own
            continue
        rest = path[len(reduction.sequences[further[-1]]) :]
        found = _covered(next_logprobs, reduction, rest, follows, further, own)
        begun, ended = begun + found.begun, ended + found.ended
        missed, forwards = missed + found.missed, forwards + found.forwards
    return Covered(begun, ended, missed, forwards)


def inner(reduction: Reduction, path: Symbols) -> list[int]:
    """Where in the order the tokens are that lie strictly inside a path, from its beginning."""
    spellings = [reduction.spelling(path[:end]) for end in range(1, len(path))]
    return [place for found in spellings for place in range(found.start, found.stop)]


def everything(ids: tuple[int, ...], mass: float) -> bool:
    """Follows every cover: exact."""
    return True


def along(own: Sequence[int]) -> Follows:
    """Follows one spelling alone."""
    spelling = tuple(own)
    return lambda ids, mass: ids == spelling[: len(ids)]


def above(least: float, own: Sequence[int] = ()) -> Follows:
    """Follows covers of more than some mass, and one spelling whatever its mass."""
    spelling = tuple(own)
    return lambda ids, mass: mass > least or ids == spelling[: len(ids)]


@dataclass(frozen=True, slots=True)
class Spot:
    """A member's position in a path. start: symbols before it; size: of its own next token, 0 where that leaves the
    path; logprob: of this token; begun: logs of the mass of tokens that begin with the next 1, 2, ... symbols, just:
    of those that are these and no more.
    """

    start: int
    size: int
    logprob: float
    begun: Floats
    just: Floats


@dataclass(frozen=True, slots=True)
class Said:
    """Logs along a path: of its first 0, 1, ..., n symbols' covers, and of its own spelling of all of them.

    missed: of covers of the whole path that leave its own spelling, at most.
    """

    begun: Floats  # (n + 1,)
    ended: float
    missed: float

    @property
    def steps(self) -> Floats:
        """(n,) of each symbol after those before it, the last one with the boundary that follows it."""
        values = np.append(self.begun[:-1], self.ended)
        with np.errstate(invalid="ignore"):
            steps = np.diff(values)
        return np.where(np.isneginf(values[1:]) | np.isneginf(values[:-1]), -math.inf, steps)


def said(spots: Sequence[Spot], start: int, end: int) -> Said:
    """What a member says of a path from `start` to `end`, along its own spelling. spots: of this part, in order."""
    begun = np.full(end - start + 1, -math.inf)
    begun[0] = 0.0
    known, missed, at = 0.0, -math.inf, start
    for spot in spots:
        if spot.start != at:  # its own spelling has left the path
            break
        left = end - at
        new = known + spot.begun[:left]
        part = begun[at - start + 1 : at - start + 1 + len(new)]
        part[:] = np.logaddexp(part, new)
        missed = np.logaddexp(missed, known + _others(spot, left))
        known, at = known + spot.logprob, at + spot.size
        if not spot.size:
            break
    return Said(begun, known if at == end else -math.inf, float(missed))


def _others(spot: Spot, left: int) -> float:
    """Log-mass of tokens other than its own that lie strictly inside the next `left` symbols."""
    masses = np.exp(spot.just[: left - 1])
    if 0 < spot.size <= len(masses):
        masses[spot.size - 1] = max(masses[spot.size - 1] - math.exp(spot.logprob), 0.0)
    return math.log(total) if (total := float(masses.sum())) > 0 else -math.inf

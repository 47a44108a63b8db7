"""Time things on a machine that others use as well: in turns, as medians with their spread.

Contestants run A B A B ..., so that what disturbs one disturbs the other, and ratios are taken turn by turn. Knows
no models, no tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles, in the unit of the samples."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    num: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return Spread(median(samples), percentile(samples, 25), percentile(samples, 75), len(samples))

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.num)


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100), linear between the two nearest ranks. Raises ValueError for no samples."""
    if not samples:
        raise ValueError("a percentile of no samples; measure at least one")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def take_turns(
    contestants: Mapping[str, Callable[[], None]], rounds: int, *, warmup: int = 2, title: str = ""
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after `warmup` rounds that do not count.

    A contestant times nothing itself; to leave something out of the time, give a `Timed`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm(range(-warmup, rounds), desc=title, unit="round", disable=None, leave=False):
        for name, run in contestants.items():
            prepare = run.prepare if isinstance(run, Timed) else None
            if prepare is not None:
                prepare()
            started = time.perf_counter()
            run()
            elapsed = time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed, and what restores the state before it and is not."""

    run: Callable[[], object]
    prepare: Callable[[], None]

    def __call__(self) -> None:
        """The timed part."""
        self.run()


def ratios(over: Sequence[float], under: Sequence[float]) -> Spread:
    """over / under, turn by turn."""
    return Spread.of([a / b for a, b in zip(over, under, strict=True)])

"""Ways of answering the same items, compared: what every fit reports.

Each way has a 95 % bootstrap interval over items, and a paired one of its difference from the best single model. Does
not know what was fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ensemble_core.evaluation.bootstrap import Interval, Ratio, draws, interval, paired_interval
from ensemble_core.evaluation.report import aligned


@dataclass(frozen=True, slots=True)
class Compared:
    """One way, and its difference from the best single model, which has none itself."""

    name: str
    value: Interval
    difference: Interval | None


def compare(singles: Mapping[str, Ratio], ways: Mapping[str, Ratio]) -> list[Compared]:
    """The best single model first, then the other ways in their order. All are over the same items."""
    best = max(singles, key=lambda name: singles[name].value)
    counts = draws(len(singles[best].numerators))
    first = Compared(f"{best} (the best model)", interval(singles[best], counts), None)
    others = [
        Compared(name, interval(way, counts), paired_interval(way, singles[best], counts))
        for name, way in ways.items()
    ]
    return [first, *others]


def gain_of(compared: list[Compared], name: str) -> Interval:
    """The difference of one way from the best single model."""
    (found,) = (each.difference for each in compared if each.name == name)
    assert found is not None
    return found


def table_of(compared: list[Compared]) -> str:
    """For people."""
    lines = [("chosen by", "value", "95 % interval", "difference", "95 % interval")]
    for each in compared:
        value, other = each.value, each.difference
        shown = ("", "") if other is None else (f"{other.value:+.4f}", f"{other.low:+.4f} .. {other.high:+.4f}")
        lines.append((each.name, f"{value.value:.4f}", f"{value.low:.4f} .. {value.high:.4f}", *shown))
    return aligned(lines)

"""Whether samples have a distribution, or one in common, by chi-square. Seeds are given: nothing is left to luck."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor


def unlike(statistic: float, freedom: int) -> bool:
    """Whether a chi-square statistic is one that hardly any sample of the distribution has."""
    return statistic > freedom + 4.5 * (2 * freedom) ** 0.5


def homogeneous(left: Counter[Any], right: Counter[Any], num_common: int = 1) -> bool:
    """Whether two samples of one size may come from one distribution; at least so many values must be common."""
    pairs = [(left[key], right[key]) for key in left.keys() | right.keys()]
    common = [pair for pair in pairs if sum(pair) >= 20]
    assert len(common) >= num_common
    rest = [pair for pair in pairs if sum(pair) < 20]
    cells = [*common, (sum(a for a, _ in rest), sum(b for _, b in rest))]
    return not unlike(sum((a - b) ** 2 / max(a + b, 1) for a, b in cells), len(cells) - 1)


def fits(found: Counter[tuple[int, ...]], expected: Tensor) -> bool:
    """Whether sampled texts of one token have a distribution (V,)."""
    num = sum(found.values())
    likely = [token for token in range(len(expected)) if expected[token] * num >= 10]
    cells = [(found[(token,)], float(expected[token]) * num) for token in likely]
    cells.append((num - sum(seen for seen, _ in cells), max(num - sum(share for _, share in cells), 1e-9)))
    freedom = len(cells) - 1 - (cells[-1][1] < 10)
    if cells[-1][1] < 10:
        assert cells.pop()[0] < 40
    return not unlike(sum((seen - share) ** 2 / share for seen, share in cells), freedom)

"""The best weights of a linear pool, from a handful of fusions.

Where what a fusion gives the true tokens is linear in the weights (p = sum_i w_i s_i, as in any linear pool, behind a
gate or on a union), the shares s_i follow from as many fusions as there are members, and the likelihood is that of a
mixture of fixed components: concave, with EM going up at every step to its one greatest value. Whether it is linear
is found out by one more fusion, not declared. Knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ensemble_core.evaluation.weights import Weights

_TOLERANCE = 1e-3  # of the linear prediction, relative, at every position
_MAX_STEPS = 5000


def linear_shares(probabilities: Callable[[Weights], Tensor], num_members: int) -> Tensor | None:
    """(P, M) float64 shares s with probabilities(w) = s w where all members have weight; None if there are none.

    probabilities: weights -> (P,) float64, of the true tokens.
    """
    known = 0.5 * torch.eye(num_members, dtype=torch.float64) + 0.5 / num_members
    values = torch.stack([probabilities(tuple(row)) for row in known.tolist()], dim=1)  # (P, M)
    shares = torch.linalg.solve(known, values.t()).t().clamp_min(0.0)
    other = torch.arange(1.0, num_members + 1, dtype=torch.float64)
    other = other / other.sum()
    found = probabilities(tuple(other.tolist()))
    linear = (shares @ other - found).abs() <= _TOLERANCE * found
    return shares if bool(linear.all()) else None


def fit_mixture(shares: Tensor, precision: float = 1e-4) -> Weights:
    """The weights at which sum log(s w) is greatest: w_i <- w_i mean(s_i / s w) (Dempster, Laird, Rubin 1977)."""
    weights = torch.full((shares.shape[1],), 1.0 / shares.shape[1], dtype=torch.float64)
    shares = shares[shares.sum(dim=1) > 0]
    for _ in range(_MAX_STEPS if len(shares) else 0):
        gains = (shares / (shares @ weights).unsqueeze(1)).mean(dim=0)  # in the end 1, or less at weight 0
        if float(gains.max()) <= 1.0 + precision:
            break
        weights = weights * gains
    return tuple((weights / weights.sum()).tolist())

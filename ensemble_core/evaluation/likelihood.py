"""The likelihood of the true tokens at shared positions as a function of the weights, and the best weights.

For a linear pool the best weights follow from a few fusions (`mixture.py`). For any other fusion a search finds them
(`weights.py`); its coarse steps use an eighth of the positions. Either way the result is no worse than the recipe's
own weights at the given positions. Does not know tasks or where scores come from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.mixture import fit_mixture, linear_shares
from ensemble_core.evaluation.offline import SharedPositions, fuse_positions
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.weights import Weights, minimise

logger = logging.getLogger(__name__)

_SCREENED = 8  # coarse steps use one in this many positions,
_ENOUGH = 500  # but at least this many


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The likelihood over some positions. progress: called with the number of positions just fused."""

    scores: Scores
    recipe: Recipe
    shared: SharedPositions
    num_candidates: int
    progress: Callable[[int], object]

    def probabilities(self, weights: Weights) -> Tensor:
        """(P',) float64: the probabilities of the true tokens at the positions that are scored."""
        fused = fuse_positions(self.scores, self.recipe, self.shared, self.num_candidates, weights)
        self.progress(len(self.shared.rows))
        counted = self.scores.members[self.recipe.main].scored[self.shared.rows]
        return fused.logprobs[counted].double().exp()

    def nats(self, weights: Weights) -> float:
        """Mean -log p per position."""
        value = -float(self.probabilities(weights).log().mean())
        named = ", ".join(f"{m} {w:.3f}" for m, w in zip(self.recipe.members, weights, strict=True))
        logger.info("%s: %.5f nats per shared position", named, value)
        return value

    def best_weights(self) -> Weights:
        """The weights that minimise `nats`, to about 0.01."""
        few = replace(self, shared=self.shared.spread(max(len(self.shared.rows) // _SCREENED, _ENOUGH)))
        linear = linear_shares(few.probabilities, len(self.recipe.members)) is not None
        mixed = self.best_mixture() if linear else None
        return mixed or minimise(self.nats, self.recipe.weights, screen=few.nats)

    def best_mixture(self) -> Weights | None:
        """The best weights of a linear pool; None for any other fusion.

        A member without weight does not contribute to the support, so the corners of the simplex are tried apart.
        """
        num_members = len(self.recipe.members)
        shares = linear_shares(self.probabilities, num_members)
        if shares is None:
            return None
        corners = [tuple(row) for row in torch.eye(num_members).tolist()]
        return min([fit_mixture(shares), self.recipe.weights, *corners], key=self.nats)

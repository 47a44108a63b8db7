"""The weights with which places are fused: a recipe's, or what its gate makes of them there.

Knows recipes and candidates; does not know fusions or sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_core.decoding.recipe import Recipe
from ensemble_core.members.base import Candidates


def weights_at(recipes: Sequence[Recipe], candidates: Sequence[Candidates]) -> Tensor:
    """(B, M) float32, rows sum to 1. recipes: one for each row, of the same members with the same gate.

    candidates: M of B rows, main first, on one device.
    """
    weights = torch.tensor([recipe.weights for recipe in recipes], device=candidates[0].tail.device)
    gate = recipes[0].gate
    return weights if gate is None else gate.weigh(candidates, weights)

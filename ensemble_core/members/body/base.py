"""What turns the tokens of a packed pass into logits.

`transformers.TransformersBody` runs any model by its own code, `flat.FlatBody` the families whose layers are known,
`graphs.GraphedBody` replays decode steps of either. Does not know feeds, candidates or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from ensemble_core.members.attention.base import Pass
from ensemble_core.members.cache.base import tensor_bytes


class Body(Protocol):
    """(tokens of a pass) -> logits."""

    @property
    def embedding(self) -> nn.Module:
        """The table of input embeddings."""

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """token_ids: (N,) in the order of the pass; wanted: places that answer. (N_wanted, V) logits."""

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of weights."""


def weight_bytes(weights: Iterable[Tensor]) -> dict[str, int]:
    """Device -> bytes of tensors; one that is shared counts once."""
    return tensor_bytes({id(weight): weight for weight in weights}.values())

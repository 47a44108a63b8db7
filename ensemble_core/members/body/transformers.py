"""A model's body: what turns the tokens of a packed pass into logits.

`TransformersBody` runs any model that goes through transformers' attention interface, by its own code;
`flat.FlatBody` runs the families whose layers are known. Does not know feeds, candidates or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ensemble_core.members.attention.rows import NAME, Pass


class Body(Protocol):
    """(tokens of a pass) -> logits."""

    @property
    def embedding(self) -> nn.Module:
        """The table of input embeddings."""

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """token_ids: (N,) in the order of the pass; wanted: places that answer. (N_wanted, V) logits."""

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of weights."""


class TransformersBody:
    """A transformers model, its attention replaced by the packed one."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """device: where the last layer and the head are."""
        model.set_attn_implementation(NAME)
        self._model, self._device = model, device
        self.embedding: nn.Module = model.get_input_embeddings()

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """See `Body`."""
        first = next(self.embedding.parameters()).device
        output = self._model(
            input_ids=token_ids.unsqueeze(0).to(first),
            position_ids=run.positions.unsqueeze(0).to(first),
            use_cache=False,
            logits_to_keep=wanted.to(self._device),
            unisono=run,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def num_bytes(self) -> dict[str, int]:
        """See `Body`."""
        return weight_bytes(self._model.parameters())


def weight_bytes(weights: Iterable[Tensor]) -> dict[str, int]:
    """Device -> bytes of tensors; one that is shared counts once."""
    sizes: dict[str, int] = {}
    for weight in {id(weight): weight for weight in weights}.values():
        device = str(weight.device)
        sizes[device] = sizes.get(device, 0) + weight.numel() * weight.element_size()
    return sizes

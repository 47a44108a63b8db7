"""The body of any model that goes through transformers' attention interface: the model's own code, packed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_core.members.attention.base import NAME, Pass
from ensemble_core.members.body.base import weight_bytes


class TransformersBody:
    """A transformers model, its attention replaced by the packed one."""

    def __init__(self, model: Any, device: torch.device, shared: Iterable[Tensor] = ()) -> None:
        """device: where the last layer and the head are. shared: weights that are another body's."""
        model.set_attn_implementation(NAME)
        self.model, self._device = model, device
        self._shared = {id(weight) for weight in shared}
        self.embedding: nn.Module = model.get_input_embeddings()

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """See `base.Body`."""
        first = next(self.embedding.parameters()).device
        output = self.model(
            input_ids=token_ids.unsqueeze(0).to(first),
            position_ids=run.positions.unsqueeze(0).to(first),
            use_cache=False,
            logits_to_keep=wanted.to(self._device),
            unisono=run,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def num_bytes(self) -> dict[str, int]:
        """See `base.Body`."""
        return weight_bytes(weight for weight in self.model.parameters() if id(weight) not in self._shared)

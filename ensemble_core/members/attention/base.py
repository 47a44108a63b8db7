"""The contract between a model's layers and what is cached, whether that is rows or pages.

All sequences' new tokens are packed in one row: linear layers run once, attention where each sequence is cached.
`packed_attention` is registered with transformers' attention interface under NAME; a forward carries its pass as a
keyword argument down to it. The query heads of a KV group are folded into the query length, which is several times
faster on CPU than repeating keys and values.

Invariant of every pass: a token attends to what its own sequence has cached up to and including itself, within the
layer's window, and to nothing else. Does not know tokens, logits or models.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ensemble_core.errors import UnsupportedModelError

NAME = "unisono_packed"
_KNOWN = {"unisono", "dropout", "position_ids", "use_cache", "is_causal", "cache_position"}
_KNOWN |= {"output_attentions", "output_hidden_states", "output_router_logits"}  # what a model reports, not how


class Pass(Protocol):
    """One forward's tokens, and how each layer's attention reaches what is cached.

    Of rows (`rows.PackedPass`) or of pages (`pages.PagedPass`).
    """

    @property
    def positions(self) -> Tensor:
        """(N,) int64: each token's place in its sequence."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values (N, Hkv, D) of a layer, and attend with queries (N, H, D): (N, H, D).

        at: places (M,) int64 on the CPU that are asked for; then (M, H, D). None: all.
        """


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, N, D)
    key: Tensor,  # (1, Hkv, N, D)
    value: Tensor,  # (1, Hkv, N, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; returns (1, N, H, D). Writes the new keys and values."""
    _refuse_unknown(module, kwargs)
    run: Pass = kwargs["unisono"]
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))  # (N, heads, D)
    return run.attend(layer, query, key, value, scaling, sliding_window).unsqueeze(0), None


def folded_attention(
    query: Tensor,  # (B*T, H, D)
    keys: Tensor,  # (B, Hkv, L, D)
    values: Tensor,  # (B, Hkv, L, D)
    mask: Tensor | None,  # (B, 1, T, L), added to scores
    scaling: float | None,
) -> Tensor:
    """Attention of B rows with T new tokens each, heads of a KV group folded into the query length: (B*T, H, D)."""
    rows, kv_heads = keys.shape[0], keys.shape[1]
    new, heads, size = query.shape[0] // rows, query.shape[1], query.shape[2]
    fold = heads // kv_heads
    folded = query.reshape(rows, new, kv_heads, fold, size).permute(0, 2, 3, 1, 4)  # no copy where new is 1
    folded = folded.reshape(rows, kv_heads, fold * new, size)
    out = scaled_dot_product_attention(folded, keys, values, attn_mask=_folded_mask(mask, fold), scale=scaling)
    out = out.view(rows, kv_heads, fold, new, size).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * new, heads, size)


def _folded_mask(mask: Tensor | None, fold: int) -> Tensor | None:
    """(B, 1, T, L) -> (B, 1, fold * T, L)."""
    return mask if mask is None or fold == 1 else mask.repeat(1, 1, fold, 1)


def _refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """A keyword that this attention does not know (softcap, sinks, ...) would change the answer: refuse it."""
    unknown = [name for name, value in kwargs.items() if name not in _KNOWN and value is not None]
    if unknown:
        raise UnsupportedModelError(f"{type(module).__name__} needs {unknown}, which packed attention lacks")


AttentionInterface.register(NAME, packed_attention)

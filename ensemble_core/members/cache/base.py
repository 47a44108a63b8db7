"""The contract between a member and its cache, and what rows and pages have in common.

Knows shapes and token ids; does not know models, schedules or attention.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MIN_PREFIX = 16  # tokens; a shorter prefix is computed as fast as it is found and copied


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer caches."""

    num_kv_heads: int
    head_size: int
    device: torch.device


class Cache(Protocol):
    """What a member asks of its cache, whether that is rows (`rows.KVCache`) or pages (`pages.PagedCache`)."""

    @property
    def page_size(self) -> int:
        """Tokens a page; a row is one page."""

    @property
    def num_pages(self) -> int:
        """All pages."""

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""

    def length(self, seq_id: int) -> int:
        """Tokens cached of a sequence; 0 for an unknown one."""

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """Begin a sequence with the longest cached prefix of `token_ids`; returns its length, 0 if nothing began.

        Prefixes of sequences with another salt do not count.
        """

    def advance(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """A forward has written these tokens."""

    def rollback(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens; 0 of an unknown sequence is fine."""

    def release(self, seq_id: int, keep: bool = False) -> None:
        """Give back what a sequence holds, or keep it as a cached prefix; an unknown sequence is fine."""

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of keys and values."""

    def check(self) -> None:
        """Integrity of the accounts. For tests and debugging."""


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences of ids have in common from their beginning; by halves, since slices compare fast."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def longest_shared(cached: Iterable[list[int]], token_ids: list[int]) -> tuple[int, int]:
    """Which of `cached` has the longest beginning in common with `token_ids`, the first of equals, and its length.

    (-1, 0) where that is shorter than `MIN_PREFIX`. Most are passed over at a glance: to be longer than what is
    found, one must agree at the place behind it.
    """
    best, length, most = -1, MIN_PREFIX - 1, len(token_ids)
    for index, ids in enumerate(cached if most >= MIN_PREFIX else ()):
        if length < most and length < len(ids) and ids[length] == token_ids[length]:
            shared = shared_prefix(ids, token_ids)
            best, length = (index, shared) if shared > length else (best, length)
    return (best, length) if best >= 0 else (-1, 0)


def bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, in bytes."""
    return sum(2 * layer.num_kv_heads * layer.head_size for layer in layers) * dtype.itemsize


def tensor_bytes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Device -> bytes of tensors."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        device = str(tensor.device)
        sizes[device] = sizes.get(device, 0) + tensor.numel() * tensor.element_size()
    return sizes


def zeros(layer: LayerShape, slots: int, dtype: torch.dtype) -> Tensor:
    """(slots, Hkv, D) of zeros on the layer's device."""
    shape = (slots, layer.num_kv_heads, layer.head_size)
    if layer.device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=layer.device)
    return _zero_pages(slots * layer.num_kv_heads * layer.head_size * dtype.itemsize).view(dtype).view(shape)


def _zero_pages(size: int) -> Tensor:
    """(size,) uint8 zeros that take memory page by page, as they are written.

    Small pages: where a huge one is made at the first write, a new row costs one in every layer, for a few tokens.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)

"""Moves the tensors of a body to the machine's memory and back, while nobody computes with them.

They are found by walking what the body is made of, so that none is forgotten: weights, tables, constants of norms.
Tensors keep their identity, and those that share memory (an embedding and a head that is tied to it) share it
afterwards. Does not know models, devices' streams or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Parked:
    """What was moved, and where it belongs."""

    def __init__(
        self, body: object, goes: Callable[[Tensor], bool] = lambda tensor: tensor.device.type != "cpu"
    ) -> None:
        """Move the tensors of a body for which `goes` is true to the CPU."""
        self._moved = [(tensor, tensor.device) for tensor in tensors_of(body) if goes(tensor)]
        _move([(tensor, torch.device("cpu")) for tensor, _ in self._moved])

    def bring_back(self) -> None:
        """Each tensor to where it was; once."""
        _move(self._moved)
        self._moved = []


def _move(tensors: list[tuple[Tensor, torch.device]]) -> None:
    """Each storage once, then every tensor onto its copy."""
    copies: dict[tuple[int, torch.device], torch.UntypedStorage] = {}
    views = []
    for tensor, device in tensors:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), device)
        if key not in copies:
            copies[key] = _copied(storage, device)
        view = torch.empty(0, dtype=tensor.dtype, device=device)
        views.append(view.set_(copies[key], tensor.storage_offset(), tensor.size(), tensor.stride()))
    for (tensor, _), view in zip(tensors, views, strict=True):
        tensor.data = view


def _copied(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    copy = torch.UntypedStorage(storage.nbytes(), device=device)  # type: ignore[no-untyped-call]
    copy.copy_(storage)
    return copy


def tensors_of(body: object) -> list[Tensor]:
    """Every tensor that a part of a member or a module holds, each once."""
    return list({id(tensor): tensor for tensor in _found(body, set())}.values())


def _found(thing: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    for part in _parts(thing):
        yield from _found(part, seen)


def _parts(thing: object) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        yield from thing.values()
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from thing
    elif isinstance(thing, partial):
        yield from (*thing.args, *thing.keywords.values())
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("ensemble_core.members."):
        yield from getattr(thing, "__dict__", {}).values()
        names = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
        yield from (getattr(thing, name) for name in names if hasattr(thing, name))

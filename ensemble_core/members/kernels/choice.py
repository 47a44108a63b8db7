"""The one place that decides between plain and compiled kernels; whoever loads a member asks it, once."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ensemble_core.members.kernels import compiled
from ensemble_core.members.kernels.base import Kernels
from ensemble_core.members.kernels.plain import PlainKernels


def choose(devices: Iterable[torch.device], dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a member whose layers are on these devices."""
    if not all(compiled.serves(device, dtype) for device in devices):
        return PlainKernels()
    from ensemble_core.members.kernels.compiled.kernels import CompiledKernels

    return CompiledKernels()

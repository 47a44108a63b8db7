"""The one place that decides between plain and compiled kernels; whoever loads a member asks it, once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache

import torch

from ensemble_core.members.kernels.base import Kernels
from ensemble_core.members.kernels.plain import PlainKernels

logger = logging.getLogger(__name__)

_COMPILED = (torch.float32, torch.bfloat16)


def choose(devices: Iterable[torch.device], dtype: torch.dtype) -> Kernels:
    """The fastest kernels for a member of this dtype whose layers are on these devices."""
    if dtype not in _COMPILED or any(device.type != "cpu" for device in devices) or not can_compile():
        return PlainKernels()
    from ensemble_core.members.kernels.compiled.kernels import CompiledKernels

    return CompiledKernels()


@cache
def can_compile() -> bool:
    """Whether compiled loops can be had here."""
    try:
        from ensemble_core.members.kernels.compiled import base  # noqa: F401
    except ImportError as error:
        logger.warning("decoding on CPU is slower without numba (pip install 'unisono[cpu]'): %s", error)
        return False
    return True

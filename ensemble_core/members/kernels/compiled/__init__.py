"""Loops that numba compiles for this processor, where torch has no operation on CPU that reads memory once.

`serves` says whether they are there for some tensors; its callers import them behind it, and stay with torch without.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether compiled loops take tensors of this type on this device."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _can_compile()


@cache
def _can_compile() -> bool:
    try:
        from ensemble_core.members.kernels.compiled import base  # noqa: F401
    except ImportError as error:
        logger.warning("decoding on CPU is slower without numba (pip install 'unisono[cpu]'): %s", error)
        return False
    return True

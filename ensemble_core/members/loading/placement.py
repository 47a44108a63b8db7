"""Which member goes on which device, in which dtype, with how much memory; said before anything is loaded.

Knows the configuration and the devices of this machine; does not load models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ensemble_core.config import MemberConfig
from ensemble_core.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

PAGE_SIZES = {"cuda": 256, "cpu": 16}  # tokens; 256 is what the attention kernel takes


def resolve_device(name: str, member: MemberConfig) -> torch.device:
    """The device of a member without a device_map. Raises ConfigError for one that this machine lacks."""
    if member.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(member.device)
    except RuntimeError as error:
        raise ConfigError(_no_device(name, member)) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(_no_device(name, member))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"members.{name}.device: {member.device!r} is not on this machine, which has "
            f"{torch.cuda.device_count()} CUDA devices; choose another, or cpu"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda:0")
    return device


def page_size(member: MemberConfig, device: torch.device) -> int | None:
    """Tokens a page of the member's cache on this device; None: a row a sequence."""
    paged = member.kv_cache == "paged" or (member.kv_cache == "auto" and device.type == "cuda")
    return PAGE_SIZES[device.type] if paged else None


def _no_device(name: str, member: MemberConfig) -> str:
    return f"members.{name}.device: {member.device!r} is not supported; write auto, cpu or cuda:N"


def log_plan(members: Mapping[str, MemberConfig]) -> None:
    """One line a member: what goes where."""
    for name, member in members.items():
        where = f"device_map {member.device_map}" if member.device_map else resolve_device(name, member)
        logger.info(
            "plan: %s = %s on %s, dtype %s, cache %s, up to %d tokens a sequence",
            name,
            member.model,
            where,
            member.dtype,
            f"{member.kv_memory / 2**30:.2f} GiB" if isinstance(member.kv_memory, int) else member.kv_memory,
            member.max_len,
        )

"""How much cache each member gets: planned before anything is loaded, from the memory that weights leave.

`kv_memory: auto` takes an equal share of what is left on the member's device, and no more than `max_running`
sequences of `max_len` tokens need; what one does not need goes to the others. Sizes are estimates from checkpoints'
files and configs, made before a model is built; the cache itself is counted in whole rows or pages later.

Knows checkpoints, devices and the system's memory; does not load models and does not know schedules.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ensemble_core.errors import CheckpointError, ConfigError
from ensemble_core.member_config import AUTO, MemberConfig
from ensemble_core.members.loading.checkpoints import resolve_adapter
from ensemble_core.members.loading.placement import DTYPES, page_size, resolve_device

logger = logging.getLogger(__name__)

SHARE = {"cuda": 0.85, "cpu": 0.5}  # of what weights leave; the rest is for passes, matrices and everybody else
SPREAD = 2 * 2**30  # auto for a member with a device_map, whose layers may lie anywhere
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Need:
    """What one member asks of a device, in bytes.

    sequence: keys and values of `max_len` tokens, in whole pages; scratch: a page beyond all sequences, or nothing.
    """

    device: torch.device
    weights: int
    sequence: int
    max_len: int
    scratch: int = 0


def plan_caches(
    members: Mapping[str, MemberConfig], folders: Mapping[str, Path], max_running: int
) -> dict[str, MemberConfig]:
    """The members with a number for every `kv_memory`; logs what goes where.

    Raises ConfigError where a device has no room for one sequence of a member.
    """
    planned = dict(members)
    spread = {name for name, member in members.items() if member.device_map is not None}
    needs = {
        name: _need(name, member, folders[name], alone=member.base not in members)
        for name, member in members.items()
        if name not in spread
    }
    for device in dict.fromkeys(need.device for need in needs.values()):
        here = {name: need for name, need in needs.items() if need.device == device}
        sizes = _sizes(device, here, {name: members[name].kv_memory for name in here}, max_running)
        planned |= {name: members[name].model_copy(update={"kv_memory": size}) for name, size in sizes.items()}
    for name in spread:
        if members[name].kv_memory == AUTO:
            planned[name] = members[name].model_copy(update={"kv_memory": SPREAD})
    for name, need in needs.items():
        _log(name, need, planned[name].cache_bytes)
    return planned


def share_out(room: int, most: Mapping[str, int]) -> dict[str, int]:
    """Split `room` equally; nobody gets more than `most`, and what is left over goes to the others."""
    shares: dict[str, int] = {}
    for rank, name in enumerate(sorted(most, key=lambda name: most[name])):
        shares[name] = min(most[name], room // (len(most) - rank))
        room -= shares[name]
    return shares


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now; on the CPU no more than the process' cgroup allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *cgroup_rooms(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def resident_bytes() -> int:
    """What this process holds of the machine's memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def give_back(*, circles: bool = True) -> None:
    """Return what nobody refers to any more: Python's circles, torch's cache on GPUs, the C library's free lists.

    circles: look for them, which stops all threads for as long as it takes: 0.25 s beside the demo pair.
    """
    if circles:
        frozen = gc.get_freeze_count() > 0
        gc.unfreeze()  # a circle may go through what was there at start
        gc.collect()
        if frozen:
            gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cgroup_rooms(mount: Path, own: Path) -> Iterable[int]:
    """What every cgroup that this process is in leaves (version 2, and the usual place of version 1), in bytes."""
    try:
        paths = [line.split(":", 2)[2].strip("/") for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        paths = []
    folders = {mount, mount / "memory"}
    for path in paths:
        folders |= {mount / path, *(mount / parent for parent in Path(path).parents)}
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in folders:
        for limit, used in names:
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                yield max(0, most - now)


def _number(file: Path) -> int | None:
    """What a file says; None where it is not there or says `max`."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _sizes(
    device: torch.device, needs: Mapping[str, Need], asked: Mapping[str, int | str], max_running: int
) -> dict[str, int]:
    """Bytes of cache for the members of one device."""
    sizes = {name: size for name, size in asked.items() if isinstance(size, int)}
    most = {name: max_running * need.sequence + need.scratch for name, need in needs.items() if name not in sizes}
    if not most:
        return sizes
    weights, free = sum(need.weights for need in needs.values()), free_memory(device)
    room = int(SHARE[device.type] * max(0, free - weights - sum(sizes.values())))
    shares = share_out(room, most)
    for name, size in shares.items():
        if size < needs[name].sequence + needs[name].scratch:
            raise ConfigError(
                f"members.{name}.kv_memory: auto leaves {_gib(size)} GiB on {device}, where one sequence of "
                f"{needs[name].max_len} tokens needs {_gib(needs[name].sequence)} ({_gib(free)} are free, all "
                f"weights there take {_gib(weights)}); lower max_len, choose a smaller model or another device"
            )
    return sizes | shares


def _need(name: str, member: MemberConfig, folder: Path, alone: bool = True) -> Need:
    """alone: an adapter's base is there already, and is read once more while the adapter is proved."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=member.trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"members.{name}.model: the config of {folder} cannot be read: {error}") from error
    dtype = DTYPES.get(member.dtype) or getattr(config, "dtype", None) or torch.float32
    max_len = min(member.max_len, int(getattr(config, "max_position_embeddings", None) or member.max_len))
    device, token = resolve_device(name, member), _token_bytes(config, dtype)
    own = {folder} if member.adapter is None else {resolve_adapter(member)}  # an adapter's base counts once
    own |= {folder} if alone else set()
    weights = sum(_weight_bytes(each, DTYPES.get(member.dtype)) for each in own)
    size = page_size(member, device)
    if size is None:
        return Need(device, weights, max_len * token, max_len)
    return Need(device, weights, -(-max_len // size) * size * token, max_len, scratch=size * token)


def _token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * size * dtype.itemsize)


def _weight_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Of all safetensors files, in the dtype that they are loaded in (None: as saved)."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            total += _file_bytes(file, dtype)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from error
    return total


def _file_bytes(file: Path, dtype: torch.dtype | None) -> int:
    total = 0
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a mapping)
            part = tensors.get_slice(key)
            size = dtype.itemsize if dtype is not None else _SIZES.get(part.get_dtype(), 4)
            total += size * torch.Size(part.get_shape()).numel()
    return total


def _log(name: str, need: Need, size: int) -> None:
    logger.info(
        "plan: %s on %s takes about %s GiB of weights and %s GiB of cache: %d tokens, %d sequences of %d",
        name,
        need.device,
        _gib(need.weights),
        _gib(size),
        size * need.max_len // need.sequence,
        size // need.sequence,
        need.max_len,
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"

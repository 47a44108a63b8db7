"""Which member goes on which device, in which dtype, with how much memory; said before anything is loaded.

And, once they are loaded, how members of the CPU share its cores. Knows the configuration and the devices of this
machine; does not load models.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from ensemble_core.errors import ConfigError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, Member
from ensemble_core.members.cores import Cores, ForwardCost

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
        if member.host is not None and member.host.server is not None:
            server = member.host.server
            logger.info("plan: %s = %s on %s (%s)", name, member.model, server.url, server.kind)
            continue
        where = f"device_map {member.device_map}" if member.device_map else _where(name, member)
        logger.info(
            "plan: %s = %s on %s, dtype %s, cache %s, up to %d tokens a sequence",
            name,
            member.model if member.adapter is None else f"{member.adapter} on the weights of {member.base}",
            where,
            member.dtype,
            f"{member.kv_memory / 2**30:.2f} GiB" if isinstance(member.kv_memory, int) else member.kv_memory,
            member.max_len,
        )


def _where(name: str, member: MemberConfig) -> str:
    """The device here, or what is asked for elsewhere."""
    if member.host is None:
        return str(resolve_device(name, member))
    if member.host.ray is None:
        return f"{resolve_device(name, member)} in a process of its own"
    ray = member.host.ray
    asked = {"CPU": ray.num_cpus, "GPU": ray.num_gpus, **ray.resources}
    return "a Ray node with " + ", ".join(f"{kind} {amount:g}" for kind, amount in asked.items() if amount)


_PROBES = 3  # forwards of each kind, of which the shortest counts
_CHUNK, _ROWS = 64, 8  # tokens of one sequence, sequences of one token


def plan_cores(members: Mapping[str, Member]) -> Cores:
    """How members of the CPU share its cores, by what their forwards take on all of them; says so in the log."""
    on_cpu = {name: member for name, member in members.items() if member.lane == "cpu"}
    if not on_cpu or torch.get_num_threads() < 2:
        return Cores()
    cores = Cores(torch.get_num_threads(), {name: _cost(member) for name, member in on_cpu.items()})
    if len(on_cpu) > 1:
        teams = cores.teams({name: cost(_ROWS, _ROWS) for name, cost in cores.costs.items()})
        shares = ", ".join(f"{' and '.join(team.members)} {team.cores}" for team in teams)
        logger.info(
            "plan: %d cores, shared by members that step together: %s (of a decode step)", cores.num, shares
        )
    return cores


def measure(member: Member, cores: int) -> ForwardCost | None:
    """What forwards of a member take on so many cores, told from this thread's one; None: not on this CPU."""
    if member.lane != "cpu" or cores < 2:
        return None
    cost = _cost(member)
    return ForwardCost(cost.fixed / cores, cost.token / cores, cost.answer / cores)


def _cost(member: Member) -> ForwardCost:
    """Of a member's forwards, from three kinds of them."""
    num = min(_ROWS, member.num_pages)
    chunk = [Feed(-1, [0] * min(_CHUNK, member.max_len))]
    one, many, rows = (
        _seconds(member, feeds) for feeds in ([Feed(-1, [0])], chunk, [Feed(-1 - i, [0]) for i in range(num)])
    )
    token = max(many - one, 0.0) / max(len(chunk[0].token_ids) - 1, 1)
    answer = max((rows - one) / max(num - 1, 1) - token, 0.0)
    return ForwardCost(max(one - token - answer, 1e-6), token, answer)


def _seconds(member: Member, feeds: Sequence[Feed]) -> float:
    """The shortest of a few forwards, each from an empty cache."""
    found = []
    for _ in range(_PROBES):
        started = time.perf_counter()
        member.forward(feeds)
        found.append(time.perf_counter() - started)
        for feed in feeds:
            member.release(feed.seq_id)
    return min(found)

"""All members that do not live in this process: begun at once, so that they load side by side, then waited for.

Knows the configuration and every kind of host; does not know the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from ensemble_core.config import Config
from ensemble_core.hosts import HostConfig, ProcessHost, RayHost
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Member
from ensemble_core.members.loading.placement import resolve_device
from ensemble_core.members.remote.far import FarMember
from ensemble_core.members.remote.host import Spec, machine
from ensemble_core.members.remote.link import Link
from ensemble_core.members.remote.process import ProcessLink
from ensemble_core.members.remote.ray_actor import RayCluster
from ensemble_core.members.remote.servers.member import ServerMember
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Elsewhere:
    """The members with a host, while they are begun, waited for, and closed again if anything goes wrong."""

    def __init__(self, config: Config, vocabularies: Mapping[str, Vocabulary]) -> None:
        """Begin all of them. Raises ConfigError, HostError."""
        self._config = config
        self._far: dict[str, FarMember] = {}
        self._servers: dict[str, ServerMember] = {}
        self._cluster = _cluster(config)
        try:
            for name, member in config.members.items():
                if member.host is not None:
                    self._begin(name, member, member.host, vocabularies[name])
        except BaseException:
            self.close()
            raise

    def ready(self) -> dict[str, Member]:
        """The members, once they can answer. Raises HostError."""
        for member in self._begun:
            member.wait_ready()
            logger.info("%s: ready on %s", member.name, member.lane.partition(":")[0])
        _leave_cores(self._far.values())
        return {member.name: member for member in self._begun}

    def close(self) -> None:
        """Give up all that was begun."""
        for member in self._begun:
            member.close()

    @property
    def _begun(self) -> list[FarMember | ServerMember]:
        return [*self._servers.values(), *self._far.values()]

    def _begin(self, name: str, member: MemberConfig, host: HostConfig, vocabulary: Vocabulary) -> None:
        scheduler, timeout = self._config.scheduler, self._config.member_timeout
        assert timeout is not None, "where a member has a host there is a time-out"
        if host.server is not None:
            self._servers[name] = ServerMember(
                name,
                vocabulary,
                host.server,
                max_len=member.max_len,
                max_running=scheduler.max_running,
                num_candidates=scheduler.num_candidates,
            )
            return
        place = host.ray or host.process
        assert place is not None, "a host is one of three"
        self._far[name] = FarMember(
            name,
            vocabulary,
            self._connect(name, member, place),
            kind="Ray actor" if host.ray else "process",
            timeout=timeout,
            start_seconds=place.start_seconds,
        )

    def _connect(self, name: str, member: MemberConfig, place: RayHost | ProcessHost) -> Callable[[int], Link]:
        """How a new incarnation of a member is started."""
        settings = member.model_copy(update={"host": None}).model_dump(mode="json", exclude_unset=True)
        spec = partial(Spec, name, settings, self._config.scheduler.max_running, self._config.deterministic)
        if isinstance(place, ProcessHost):
            num_threads = place.num_threads or _share(self._config)
            return lambda incarnation: ProcessLink(spec(num_threads, incarnation))
        cluster, num_threads = self._cluster, max(1, int(place.num_cpus))
        assert cluster is not None, "a member on Ray has a cluster"
        return lambda incarnation: cluster.link(spec(num_threads, incarnation), place)


def _cluster(config: Config) -> RayCluster | None:
    hosts = {name: member.host.ray for name, member in config.members.items() if member.host and member.host.ray}
    return RayCluster(hosts) if hosts else None


def _share(config: Config) -> int:
    """Cores of a process, if all members on this CPU get the same."""
    here = [
        name
        for name, member in config.members.items()
        if (member.host is None or member.host.process is not None)
        and member.device_map is None
        and resolve_device(name, member).type == "cpu"
    ]
    return max(1, torch.get_num_threads() // max(len(here), 1))


def _leave_cores(far: Iterable[FarMember]) -> None:
    """Threads of this process make way for those of far ends on the same machine's CPU."""
    beside = [member.facts for member in far if member.facts.on_cpu and member.facts.machine == machine()]
    if taken := sum(facts.num_threads for facts in beside):
        torch.set_num_threads(max(1, torch.get_num_threads() - taken))
        logger.info(
            "plan: %d cores for members in this process, %d for those beside it", torch.get_num_threads(), taken
        )

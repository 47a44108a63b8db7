"""A far end as a Ray actor: on whichever node has what the configuration asks for.

One plain actor a member, one call a step. An actor is never restarted by Ray, and no call is ever repeated: a
repeated forward would be answered from a cache that it has changed already, and a restarted actor from an empty one.
Who asks starts a new incarnation instead. Actors end with the process that made them.

Knows Ray and links; does not know members, or what the bytes mean.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ensemble_core.errors import ConfigError, HostError
from ensemble_core.hosts import RayHost
from ensemble_core.members.remote.host import Host, Spec
from ensemble_core.members.remote.link import LinkError, Method

logger = logging.getLogger(__name__)

_NAMESPACE = "unisono"
_SIGACTION = 256  # bytes; more than any system's `struct sigaction`
_JOIN_SECONDS = 20.0  # to wait for a cluster that is being started
_PATIENCE = 10.0  # seconds without a node after which the log says what is waited for


class RayCluster:
    """The cluster that this process has joined, and its placement groups. Raises ConfigError, HostError."""

    def __init__(self, hosts: Mapping[str, RayHost]) -> None:
        """hosts: of all members on Ray; they have one address."""
        self.ray = _import()
        self._groups: dict[str, Any] = {}
        self._hosts = dict(hosts)
        self._lock = threading.Lock()
        self._join(next(iter(hosts.values())).address)

    def link(self, spec: Spec, host: RayHost) -> RayLink:
        """A new actor for a member."""
        return RayLink(self.ray, spec, host, self._strategy(spec.name, host))

    def _join(self, address: str) -> None:
        if self.ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a server reports nothing to anybody by default
        options: dict[str, Any] = {"log_to_driver": False, "namespace": _NAMESPACE, "configure_logging": False}
        options |= {"include_dashboard": False} if address == "local" else {}
        deadline = time.monotonic() + _JOIN_SECONDS
        while True:
            try:
                with _own_signals():
                    self.ray.init(address=address, **options)
                break
            except ConnectionError as error:  # a head that starts beside us may not be there yet
                if time.monotonic() > deadline:
                    raise _no_cluster(address, error) from error
                logger.info("the Ray cluster %s is not there yet: %s", address, _first_line(error))
                time.sleep(1.0)
            except (RuntimeError, ValueError) as error:
                raise _no_cluster(address, error) from error
        logger.info("joined the Ray cluster %s: %s", address, _amounts(self.ray.cluster_resources()))

    def _strategy(self, name: str, host: RayHost) -> Any:
        """Where an actor is placed: anywhere, or in its bundle of a placement group."""
        if host.group is None:
            return "DEFAULT"
        members = [other for other, each in self._hosts.items() if each.group == host.group]
        with self._lock:
            if host.group not in self._groups:
                bundles = [_demand(self._hosts[other]) for other in members]
                make = importlib.import_module("ray.util").placement_group
                self._groups[host.group] = make(bundles, strategy=host.strategy)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        return strategies.PlacementGroupSchedulingStrategy(
            self._groups[host.group], placement_group_bundle_index=members.index(name)
        )


class RayLink:
    """See `link.Link`. far: the actor's class."""

    far: type[Host] = Host

    def __init__(self, ray: Any, spec: Spec, host: RayHost, strategy: Any = "DEFAULT") -> None:
        self._ray, self._name, self._demand = ray, spec.name, _demand(host)
        options: dict[str, Any] = {
            "num_cpus": host.num_cpus,
            "num_gpus": host.num_gpus,
            "resources": host.resources,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(spec.num_threads)}},
        }
        self._actor = ray.remote(self.far).options(**options).remote(spec.encode())
        self._reply: Any = None
        self._started = time.monotonic()
        self._placed = self._told = False

    def send(self, method: Method, message: bytes) -> None:
        """See `Link.send`."""
        try:
            self._reply = self._actor.answer.remote(method, message)
        except self._ray.exceptions.RayError as error:
            raise LinkError(_first_line(error)) from error

    def receive(self, timeout: float | None = None) -> bytes | None:
        """See `Link.receive`."""
        try:
            reply: bytes = self._ray.get(self._reply, timeout=timeout)
        except self._ray.exceptions.GetTimeoutError:
            self._say_what_lacks()
            return None
        except self._ray.exceptions.RayError as error:
            raise LinkError(_first_line(error)) from error
        self._placed = True
        return reply

    def close(self) -> None:
        """See `Link.close`."""
        if self._ray.is_initialized():
            self._ray.kill(self._actor, no_restart=True)

    def _say_what_lacks(self) -> None:
        """Once, where no node takes the actor."""
        if self._placed or self._told or time.monotonic() - self._started < _PATIENCE:
            return
        self._told = True
        logger.warning(
            "member %s waits for a Ray node with %s; free in the cluster: %s",
            self._name,
            _amounts(self._demand),
            _amounts(self._ray.available_resources()),
        )


def _import() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("host.ray needs the extra unisono[ray]; run `pip install 'unisono[ray]'`") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """What this process does on SIGTERM and SIGINT stays its own: Ray would abort it, where a server drains.

    Ray's handlers are in C, and Python's `signal` serves the main thread alone; so does this through the C library.
    """
    library = ctypes.CDLL(None)
    kept = {number: ctypes.create_string_buffer(_SIGACTION) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, action in kept.items():
        library.sigaction(int(number), None, action)
    try:
        yield
    finally:
        for number, action in kept.items():
            library.sigaction(int(number), action, None)


def _no_cluster(address: str, error: Exception) -> HostError:
    return HostError(
        f"host.ray.address: the Ray cluster {address!r} cannot be joined: {_first_line(error)}; start one with `ray "
        "start --head` or join it with `ray start --address`, correct the address, or write `address: local`"
    )


def _demand(host: RayHost) -> dict[str, float]:
    amounts = {"CPU": host.num_cpus, "GPU": host.num_gpus, **host.resources}
    return {name: amount for name, amount in amounts.items() if amount}


def _amounts(resources: Mapping[str, float]) -> str:
    """Without Ray's own entries, one of which has the address of each node."""
    own = {name: amount for name, amount in sorted(resources.items()) if not name.startswith("node:")}
    memory = ("memory", "object_store_memory")
    told = [f"{name} {own[name] / 2**30:.1f} GiB" if name in memory else f"{name} {own[name]:g}" for name in own]
    return ", ".join(told) or "nothing"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""How many threads the operations of a forward have: as many as its team has cores, and those that others give back.

The number belongs to the thread that begins an operation. The team in the caller's thread grows: between its layers a
forward takes the cores of the teams that are done. It alone does, since a second pool of OpenMP's threads would be
one too many: where there are more threads than cores, the runtime waits in the kernel at every barrier.

Knows threads and numbers; does not know members.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Allotment:
    """The cores of a team, which may become more while it works."""

    def __init__(self, cores: int) -> None:
        self.cores, self._lock = cores, threading.Lock()

    def add(self, cores: int) -> None:
        """Cores of another team that is done."""
        with self._lock:
            self.cores += cores


class _Own(threading.local):
    share: Allotment | None = None


_own = _Own()


@contextmanager
def threads(share: Allotment) -> Iterator[None]:
    """Within the block, operations that this thread begins have as many threads as the share has cores."""
    before, outer = torch.get_num_threads(), _own.share
    _own.share = share
    _set(share.cores)
    try:
        yield
    finally:
        _own.share = outer
        _set(before)


def allotment() -> Allotment:
    """What this thread works with; for a thread that makes a call in its stead."""
    return _own.share or Allotment(torch.get_num_threads())


def grow() -> None:
    """Take the cores that were added to this thread's share; for a long computation, now and then."""
    if _own.share is not None:
        _set(_own.share.cores)


def _set(num: int) -> None:
    if num != torch.get_num_threads():
        torch.set_num_threads(num)

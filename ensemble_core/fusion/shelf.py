"""Built fusions by key: those of the configuration stay, of the others the least recently used go.

Thread-safe: threads that build the same fusion at once end up with one object. Does not know recipes or requests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from ensemble_core.fusion.base import Fusion


class FusionShelf:
    """See the module. size: how many are kept that are not pinned."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pinned: dict[str, Fusion] = {}
        self._others: OrderedDict[str, Fusion] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pinned) + len(self._others)

    def get(self, key: str, build: Callable[[], Fusion]) -> Fusion:
        """The fusion of a key; built, without holding the lock, where it is not there. Raises what `build` raises."""
        found = self.find(key)
        if found is not None:
            return found
        built = build()
        with self._lock:
            fusion = self._pinned.get(key) or self._others.setdefault(key, built)
            while len(self._others) > self._size:
                self._others.popitem(last=False)
        return fusion

    def pin(self) -> None:
        """What is there now stays for good."""
        with self._lock:
            self._pinned |= self._others
            self._others.clear()

    def find(self, key: str) -> Fusion | None:
        """The fusion of a key, if it is there."""
        with self._lock:
            if key in self._others:
                self._others.move_to_end(key)
            return self._pinned.get(key) or self._others.get(key)

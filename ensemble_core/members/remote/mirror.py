"""What a far end holds of each sequence, as its orders have left it, so that nobody here has to ask.

Invariant: as long as every order was carried out, `cached` equals what the far end has. Knows sequences' lengths;
does not know links or models.
"""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_core.members.base import Feed
from ensemble_core.members.remote.codec import Order


class Mirror:
    """Cached lengths of one incarnation, and the releases that have not been sent yet."""

    def __init__(self, page_size: int) -> None:
        """page_size: tokens."""
        self.cached: dict[int, int] = {}
        self._page_size = page_size
        self._known: set[int] = set()  # sequences of which the far end may hold something, after a failure too
        self._releases: list[tuple[int, bool]] = []

    @property
    def num_pages(self) -> int:
        """Pages that sequences hold; shared ones count for each."""
        return sum(-(-length // self._page_size) for length in self.cached.values())

    def release(self, seq_id: int, keep: bool) -> None:
        """Give a sequence back with the next order."""
        self.cached.pop(seq_id, None)
        if seq_id in self._known:
            self._known.discard(seq_id)
            self._releases.append((seq_id, keep))

    def order(self, incarnation: int, feeds: Sequence[Feed]) -> Order:
        """Feeds with all that waits to be sent."""
        releases, self._releases = self._releases, []
        self._known |= {feed.seq_id for feed in feeds}
        return Order(incarnation, list(feeds), [self.cached.get(feed.seq_id, 0) for feed in feeds], releases)

    def advance(self, feeds: Sequence[Feed]) -> None:
        """The far end has taken in these feeds."""
        for feed in feeds:
            self.cached[feed.seq_id] = feed.length_after(self.cached.get(feed.seq_id, 0))

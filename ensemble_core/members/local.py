"""A member that lives in this process: a body behind the packed forward, and a cache of rows or pages.

Invariants: a forward either advances every sequence it was fed or none; the answer is the model's own, whatever
else is in the pass. Does not know how a model is loaded (`loading.models`), scheduling, fusion or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch

from ensemble_core.errors import MemberError
from ensemble_core.members.answering import Layout, answer, lay_out
from ensemble_core.members.attention.base import Pass
from ensemble_core.members.attention.pages import Attention, by_gathering, pack_pages
from ensemble_core.members.attention.rows import FEW, pack
from ensemble_core.members.base import ALL_ABILITIES, Answers, Feed
from ensemble_core.members.body.base import Body
from ensemble_core.members.cache.base import MIN_PREFIX, Cache
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.kernels.base import Kernels
from ensemble_core.members.parking import Parked
from ensemble_core.members.streams import lane_on
from ensemble_core.members.threads import grow
from ensemble_core.text.vocabulary import Vocabulary


class LocalMember:
    """See `ensemble_core.members.base.Member`."""

    lost: str | None = None
    incarnation = 0

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        max_len: int,
        body: Body,
        cache: Cache,
        kernels: Kernels,
        device: torch.device,
        attention: Attention = by_gathering,
        few: int = FEW,
        renew: Callable[[], Cache] | None = None,
        *,
        adapts: bool = False,
    ) -> None:
        """device: where logits come out.

        attention: over pages; a cache of rows has no use for it. few: see `rows.pack`. renew: makes an empty cache
        like this one, for a member that may sleep. adapts: the weights are another member's, all but a few.
        """
        self.name, self.vocabulary, self.max_len, self.device = name, vocabulary, max_len, device
        self.lane, self.abilities = str(device), ALL_ABILITIES
        self._body, self._cache, self._kernels, self._attention = body, cache, kernels, attention
        self._plain, self._renew, self._adapts = body, renew, adapts
        self._graphed: Callable[[Cache], Body] | None = None  # makes the body that decodes through graphs
        self._parked: Parked | None = None
        self._memory = self._weigh()
        self._lane, self._few = lane_on(device), few
        self._by_chunks = (
            kernels.chunk_attention(cache.dtype, cache.head_sizes) if isinstance(cache, KVCache) else None
        )
        self.min_prefix = MIN_PREFIX

    def adopt(self, make: Callable[[Cache], Body] | None) -> None:
        """Run from now on through the body that `make` makes for a cache, in this member's lane; None: plainly."""
        with torch.inference_mode(), self._lane.work():
            self._body = self._plain if make is None else make(self._cache)
        self._graphed = make

    @property
    def body(self) -> Body:
        """What runs the model, without graphs."""
        return self._plain

    def sleep(self) -> None:
        """See `Sleeper.sleep`."""
        assert self._renew is not None, "this member's cache cannot be made again"
        assert self._parked is None, "it sleeps already"
        with self._lane.work():
            self._body = self._plain  # graphs hold the cache
            del self._cache
            self._parked = Parked([] if self._adapts else self._plain)
        self._memory = dict(self._plain.num_bytes())

    def wake(self) -> None:
        """See `Sleeper.wake`."""
        assert self._renew is not None, "this member's cache cannot be made again"
        assert self._parked is not None, "it is awake"
        with self._lane.work():  # not in inference mode: the cache is wiped outside of it
            self._parked.bring_back()
            self._cache = self._renew()
        self.adopt(self._graphed)
        self._parked = None
        self._memory = self._weigh()

    def _weigh(self) -> dict[str, int]:
        return dict(Counter(self._body.num_bytes()) + Counter(self._cache.num_bytes()))

    @property
    def page_size(self) -> int:
        """Tokens a page; a row is one page."""
        return self._cache.page_size

    @property
    def num_pages(self) -> int:
        """Pages, or rows."""
        return self._cache.num_pages

    @property
    def free_pages(self) -> int:
        """Pages, or rows, that no sequence holds."""
        return self._cache.num_free

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """See `Member.forward`."""
        try:
            with torch.inference_mode():
                answers = self._lane.forward(lambda: self._forward(feeds))
        except Exception as error:
            raise MemberError(self.name, f"forward failed: {type(error).__name__}: {error}") from error
        for feed in feeds:
            self._cache.advance(feed.seq_id, feed.token_ids)
        return answers

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Member.reuse`."""
        with self._lane.work():
            return self._cache.reuse(seq_id, token_ids, salt)

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`."""
        with self._lane.work():
            self._cache.release(seq_id, keep)

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`."""
        return self._memory

    def close(self) -> None:
        """See `Member.close`; nothing is held elsewhere."""

    def check_cache(self) -> None:
        """Integrity of the cache; see `Cache.check`."""
        self._cache.check()

    def _forward(self, feeds: Sequence[Feed]) -> Answers:
        for feed in feeds:
            if feed.keep is not None:
                self._cache.rollback(feed.seq_id, feed.keep)
        run, order = self._pack(feeds)
        token_ids = [token_id for i in order for token_id in feeds[i].token_ids]
        layout = lay_out(feeds)
        places = _places(feeds, order, layout)
        logits = self._body(run, torch.tensor(token_ids), torch.tensor(places, dtype=torch.long))
        grow()
        return answer(logits, feeds, layout, self._kernels)

    def _pack(self, feeds: Sequence[Feed]) -> tuple[Pass, list[int]]:
        assert len({feed.seq_id for feed in feeds}) == len(feeds), "a sequence is fed twice"
        cache, counts = self._cache, [len(feed.token_ids) for feed in feeds]
        if isinstance(cache, PagedCache):
            chains = [cache.reserve(feed.seq_id, len(feed.token_ids), feed.salt) for feed in feeds]
            return pack_pages(cache, chains, counts, self._attention)
        assert isinstance(cache, KVCache)
        rows = [cache.reserve(feed.seq_id, len(feed.token_ids), feed.salt) for feed in feeds]
        return pack(cache, rows, counts, self._kernels.attend_spans, self._few, self._by_chunks)


def _places(feeds: Sequence[Feed], order: Sequence[int], layout: Layout) -> list[int]:
    """Places in the pass that must answer, in the layout's order, then those where a following id is asked for."""
    ends: dict[int, int] = {}
    end = 0
    for i in order:
        end += len(feeds[i].token_ids)
        ends[i] = end
    answering = [p for i in layout.order for p in range(ends[i] - feeds[i].wanted, ends[i])]
    followed = [
        ends[i] - len(feed.token_ids) + at
        for i, feed in enumerate(feeds)
        for at, token_id in enumerate(feed.following)
        if token_id >= 0
    ]
    return answering + followed

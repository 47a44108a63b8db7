"""Keys and values of all sequences of one member: a pool of pages, each of a few tokens, and who holds which.

A sequence is a chain of pages and grows a page at a time; a rollback gives pages back. A chain that is released may
stay as a cached prefix. A sequence begins with the longest prefix that a running or a cached chain has in common
with it: whole pages are shared and counted, and the beginning of the page after them is copied. When pages run out,
the chain that was used least recently gives its own up, from its end. What a page holds is known by its chain's
token ids, which are compared one by one: no two texts can be mistaken for each other. Chains of different salts
share nothing.

Invariants: a page is held by chains or free, and free pages hold zeros; a page that several chains hold lies before
the end of each and is never written (a chain that was rolled back into one gets a copy); what is shared is finite,
since masked positions are multiplied by zero and not skipped; the last page of the pool is nobody's: padding is
written there. Pages that running sequences share are counted once, so they hold no more than a scheduler that
counts them for each.

Knows shapes, pages and token ids; does not know models, schedules or attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ensemble_core.members.cache.base import MIN_PREFIX, LayerShape, longest_shared, tensor_bytes, zeros


@dataclass(slots=True, eq=False)
class Chain:
    """The pages of one sequence, or of a cached prefix.

    token_ids: what the first `length` slots hold. num_finite: how many of them are known to be finite. salt: only
    sequences of the same one take it over.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_finite: int = 0
    salt: str = ""


class PagedCache:
    """Pages of keys and values for every layer; `Cache`.

    keys[layer], values[layer]: ((num_pages + 1) * page_size, Hkv, D): a slot is page * page_size + offset.
    """

    def __init__(
        self, layers: list[LayerShape], num_pages: int, page_size: int, max_len: int, dtype: torch.dtype
    ) -> None:
        """max_len: tokens of the longest sequence."""
        self.num_pages, self.page_size, self.max_len, self.dtype = num_pages, page_size, max_len, dtype
        self.keys = [zeros(layer, (num_pages + 1) * page_size, dtype) for layer in layers]
        self.values = [zeros(layer, (num_pages + 1) * page_size, dtype) for layer in layers]
        self._chains: dict[int, Chain] = {}
        self._prefixes: list[Chain] = []  # least recently used first
        self._holders = [0] * num_pages  # chains that hold each page
        self._free = list(range(num_pages - 1, -1, -1))  # the last is next

    @property
    def scratch(self) -> int:
        """The page that padding is written to."""
        return self.num_pages

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return self.num_pages - len({page for chain in self._chains.values() for page in chain.pages})

    @property
    def prefixes(self) -> list[list[int]]:
        """The token ids of what is cached beyond the running sequences, least recently used first."""
        return [list(chain.token_ids) for chain in self._prefixes]

    def pages_of(self, length: int) -> int:
        """Pages that `length` tokens take."""
        return -(-length // self.page_size)

    def chain(self, seq_id: int, salt: str = "") -> Chain:
        """The chain of a sequence; an unknown one gets an empty chain."""
        return self._chains.setdefault(seq_id, Chain(salt=salt))

    def length(self, seq_id: int) -> int:
        """Tokens cached of a sequence; 0 for an unknown one."""
        return self._chains[seq_id].length if seq_id in self._chains else 0

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Cache.reuse`."""
        assert seq_id not in self._chains, "a prefix begins a sequence"
        chains = [chain for chain in (*self._chains.values(), *self._prefixes) if chain.salt == salt]
        found, length = longest_shared((chain.token_ids for chain in chains), list(token_ids))
        if not length:
            return 0
        source = chains[found]
        if source in self._prefixes:
            self._touch(source)
        elif source.num_finite < length:
            if not self._finite(source.pages, length):
                return 0
            source.num_finite = length
        return self._begin(seq_id, source, length)

    def reserve(self, seq_id: int, num_new: int, salt: str = "") -> Chain:
        """The chain of a sequence, whose next `num_new` slots are about to be written. salt: of a new one."""
        chain = self.chain(seq_id, salt)
        assert 0 < num_new <= self.max_len - chain.length, "a feed passes the longest sequence"
        self._own_last(chain)
        while len(chain.pages) < self.pages_of(chain.length + num_new):
            page = self._take()
            assert page is not None, "no free page: the scheduler admitted more than fits"
            chain.pages.append(page)
        return chain

    def advance(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """A forward has written these tokens."""
        chain = self._chains[seq_id]
        chain.token_ids.extend(token_ids)
        chain.length += len(token_ids)

    def rollback(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens, and the pages that they need; 0 of an unknown sequence is fine."""
        assert 0 <= length <= self.length(seq_id), f"rollback to {length} of {self.length(seq_id)}"
        if chain := self._chains.get(seq_id):
            self._cut(chain, length)

    def release(self, seq_id: int, keep: bool = False) -> None:
        """Give pages back, wiped, or keep them as a cached prefix; an unknown sequence is fine.

        A chain that is short, not finite, or begins another one's prefix is not kept.
        """
        chain = self._chains.pop(seq_id, None)
        if chain is None:
            return
        self._cut(chain, chain.length)
        if keep and self._is_worth_keeping(chain):
            for old in [old for old in self._prefixes if _begins(old, chain)]:
                self._prefixes.remove(old)
                self._drop(old.pages)
            self._prefixes.append(chain)
        else:
            self._drop(chain.pages)

    def num_bytes(self) -> dict[str, int]:
        """Device -> bytes of keys and values."""
        return tensor_bytes((*self.keys, *self.values))

    def check(self) -> None:
        """Integrity: holders, pages, lengths and ids agree. For tests and debugging."""
        chains = [*self._chains.values(), *self._prefixes]
        held = Counter(page for chain in chains for page in chain.pages)
        assert all(held[page] == count for page, count in enumerate(self._holders)), "a page is miscounted"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert set(self._free) == {page for page, count in enumerate(self._holders) if not count}, "a page is lost"
        assert sum(held.values()) == sum(self._holders), "a page is none of the pool's"
        assert all(len(set(chain.pages)) == len(chain.pages) for chain in chains), "a page is in a chain twice"
        assert all(0 <= c.length <= len(c.pages) * self.page_size for c in chains), "a length is too long"
        assert all(c.length <= self.max_len and len(c.token_ids) == c.length for c in chains), (
            "ids and length differ"
        )
        assert all(c.num_finite <= c.length for c in chains), "slots past the end are known to be finite"
        assert all(len(c.pages) == self.pages_of(c.length) for c in self._prefixes), "a prefix holds too much"

    def _begin(self, seq_id: int, source: Chain, length: int) -> int:
        """Share the whole pages of a prefix, and copy what lies in the page after them if there is one to be had."""
        whole, rest = divmod(length, self.page_size)
        start = whole * self.page_size
        chain = Chain(source.pages[:whole], start, source.token_ids[:start], salt=source.salt)
        self._hold(chain.pages)
        if rest:
            last = source.pages[whole : whole + 1]
            ids = source.token_ids[chain.length : length]
            self._hold(last)  # it must not make way for its own copy
            page = self._take()
            if page is not None:
                self._copy(last[0], page, rest)
                chain.pages.append(page)
                chain.token_ids += ids
                chain.length = length
            self._drop(last)
        if chain.length < MIN_PREFIX:
            self._drop(chain.pages)
            return 0
        chain.num_finite = chain.length
        self._chains[seq_id] = chain
        return chain.length

    def _own_last(self, chain: Chain) -> None:
        """Before it is written: the page that a chain ends within is its own."""
        place, used = divmod(chain.length, self.page_size)
        if not used or self._holders[chain.pages[place]] == 1:
            return
        page = self._take()
        shared = chain.pages[place]
        if self._holders[shared] == 1:  # the others were prefixes, and have made way
            self._drop([] if page is None else [page])
            return
        assert page is not None, "no free page: the scheduler admitted more than fits"
        self._copy(shared, page, used)
        chain.pages[place] = page
        self._drop([shared])

    def _take(self) -> int | None:
        """A page for one holder; cached prefixes make way. None: running sequences hold all."""
        while not self._free and self._prefixes:
            oldest = self._prefixes[0]
            self._cut(oldest, (len(oldest.pages) - 1) * self.page_size)
            if oldest.length < MIN_PREFIX:
                self._prefixes.pop(0)
                self._drop(oldest.pages)
        if not self._free:
            return None
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _cut(self, chain: Chain, length: int) -> None:
        """Keep the first `length` tokens of a chain and the pages that they need."""
        kept = self.pages_of(length)
        dropped = chain.pages[kept:]
        del chain.pages[kept:]
        del chain.token_ids[length:]
        chain.length, chain.num_finite = length, min(chain.num_finite, length)
        self._drop(dropped)

    def _hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] += 1

    def _drop(self, pages: Iterable[int]) -> None:
        """One holder less for each; those that nobody holds are wiped and free."""
        unheld = []
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                unheld.append(page)
        if unheld:
            for tensor in (*self.keys, *self.values):
                paged = tensor.view(self.num_pages + 1, self.page_size, *tensor.shape[1:])
                paged.index_fill_(0, torch.tensor(unheld, device=tensor.device), 0.0)
            self._free.extend(reversed(unheld))

    def _copy(self, source: int, goal: int, length: int) -> None:
        start, to = source * self.page_size, goal * self.page_size
        for tensor in (*self.keys, *self.values):
            tensor[to : to + length] = tensor[start : start + length]

    def _touch(self, prefix: Chain) -> None:
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def _is_worth_keeping(self, chain: Chain) -> bool:
        known = len(chain.token_ids) == chain.length >= MIN_PREFIX
        longer = next((old for old in self._prefixes if known and _begins(chain, old)), None)
        if longer is not None:
            self._touch(longer)
        return known and longer is None and self._finite(chain.pages, chain.length)

    def _finite(self, pages: Sequence[int], length: int) -> bool:
        """Whether `length` slots hold finite numbers alone; a sum that overflows counts as not. One host sync."""
        slots = torch.arange(length)
        slots = torch.tensor(pages)[slots // self.page_size] * self.page_size + slots % self.page_size
        tensors, sums = (*self.keys, *self.values), []
        for tensor in tensors:
            total = tensor[slots.to(tensor.device)].sum(dtype=torch.float32)
            sums.append(total.to(tensors[0].device))
        return bool(torch.stack(sums).isfinite().all())


def _begins(short: Chain, long: Chain) -> bool:
    at = short.length - 1  # where most that differ do
    alike = short.salt == long.salt and long.token_ids[at : at + 1] == short.token_ids[-1:]
    return alike and long.token_ids[: at + 1] == short.token_ids

"""A member without a model: a byte vocabulary, next-token distributions hashed from the cached bytes.

For tests of modes, fusions and clients of the offline API. It keeps the books that a real cache keeps, and trips an
assertion where a forward overruns them. It can be told to fail, to answer NaN for a sequence, or to block.
"""

from __future__ import annotations

import codecs
import hashlib
import re
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_core.errors import MemberError
from ensemble_core.members.answering import answer, lay_out
from ensemble_core.members.base import ALL_ABILITIES, Abilities, Answers, Feed
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.text.vocabulary import Vocabulary

# What fake members like to write: a small alphabet, so that long tokens match, and the heads of é, 中 and 😀.
_LIKELY = set(b"abcde \n.\xc3\xe4\xf0")
_LONG = tuple(
    sorted({a + b for a in "abcde" for b in "abcde"} | {" " + a for a in "abcde"} | {"abc", " dea", "cab", "\n\n"})
)


def byte_vocabulary(long_tokens: Sequence[str] = (), eos: bool = True) -> Vocabulary:
    """256 bytes, then longer tokens, then `<eos>`; encodes by the longest match."""
    ordinary = [bytes([byte]) for byte in range(256)] + [token.encode() for token in long_tokens]
    ids = {token: token_id for token_id, token in enumerate(ordinary)}
    longest_first = sorted(ordinary, key=len, reverse=True)
    pattern = re.compile(b"|".join(map(re.escape, longest_first)), re.DOTALL)
    end = frozenset({len(ordinary)} if eos else ())
    return Vocabulary(
        tokens=[*ordinary, *([b"<eos>"] if eos else [])],
        special_ids=end,
        stop_ids=end,
        encode=lambda text: [ids[match] for match in pattern.findall(text.encode())],
    )


def pair_vocabulary() -> Vocabulary:
    """Bytes and pairs of letters: spells the same text in other tokens than `byte_vocabulary`."""
    return byte_vocabulary(_LONG)


class SaltedIds(list[int]):
    """What is cached of a sequence, and the salt of those that may take it over."""

    def __init__(self, ids: Sequence[int] = (), salt: str = "") -> None:
        super().__init__(ids)
        self.salt = salt


class FakeMember:
    """See `ensemble_core.members.base.Member`; the same bytes give the same distribution, however cached.

    What happened to it stands in its public fields, and tests set those that make it fail.
    """

    def __init__(
        self,
        name: str = "alpha",
        vocabulary: Vocabulary | None = None,
        *,
        seed: int = 0,
        max_len: int = 256,
        page_size: int = 16,
        num_pages: int = 1024,
        min_prefix: int = 1,
        eos_bias: float = -30.0,
        lane: str = "cpu",
        abilities: Abilities = ALL_ABILITIES,
    ) -> None:
        """eos_bias: added to the logit of stop tokens. seed: another one is another model."""
        self.name, self.min_prefix = name, min_prefix
        self.vocabulary = vocabulary or byte_vocabulary()
        self.max_len, self.page_size, self.num_pages = max_len, page_size, num_pages
        self.device, self.lane, self.abilities = torch.device("cpu"), lane, abilities
        self.cached: dict[int, SaltedIds] = {}  # seq_id -> ids
        self.calls: list[list[Feed]] = []
        self.threads: set[str] = set()  # names of the threads that forwards ran in
        self.rollbacks: list[tuple[int, int]] = []
        self.kept: list[SaltedIds] = []  # prefixes of sequences that are gone, least recently used first
        self.reuses: list[tuple[int, int]] = []  # seq_id, tokens that it began with
        self.fails_on: set[int] = set()  # sequences that make a forward raise
        self.nan_on: set[int] = set()  # sequences whose rows are NaN
        self.breaks: Exception | None = None  # raised by every forward: a bug, not a MemberError
        self.broken_calls: dict[str, Exception] = {}  # "reuse" or "release" -> what it raises
        self.lost: str | None = None
        self.incarnation = 0
        self.gate = threading.Event()  # a forward waits while it is clear
        self.gate.set()
        self.entered = threading.Event()  # a forward has begun
        self.asleep = False
        self._seed = seed
        self._prior = self._make_prior(eos_bias)

    @property
    def free_pages(self) -> int:
        """See `Member.free_pages`."""
        return self.num_pages - sum(-(-len(ids) // self.page_size) for ids in self.cached.values())

    @property
    def is_empty(self) -> bool:
        """True where no sequence holds anything."""
        return self.free_pages == self.num_pages and not self.cached

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """See `Member.forward`."""
        assert not self.asleep, "a member that sleeps is asked"
        self.calls.append(list(feeds))
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(10.0), "nobody opened the gate"
        if self.breaks is not None:
            raise self.breaks
        if failing := self.fails_on.intersection(feed.seq_id for feed in feeds):
            raise MemberError(self.name, f"told to fail on {sorted(failing)}")
        for feed in feeds:
            self._roll_back(feed)
        wanted = [self._extend(feed) for feed in feeds]
        assert self.free_pages >= 0, "more pages are used than there are"
        self._make_way()
        layout = lay_out(feeds)
        rows = [row for i in layout.order for row in wanted[i]]
        rows += [row for feed in feeds for row in self._followed(feed)]
        logits = torch.stack(rows) if rows else torch.empty(0, len(self.vocabulary))
        return answer(logits, feeds, layout, PLAIN)

    def _followed(self, feed: Feed) -> list[Tensor]:
        """Logits before each id that the feed asks to be followed; what it fed is the last of what is cached."""
        cached = self.cached[feed.seq_id]
        start = len(cached) - len(feed.token_ids)
        return [self.next_logits(cached[: start + i + 1]) for i, asked in enumerate(feed.following) if asked >= 0]

    def _roll_back(self, feed: Feed) -> None:
        cached = self.cached.get(feed.seq_id, SaltedIds())
        keep = len(cached) if feed.keep is None else feed.keep
        assert 0 <= keep <= len(cached), f"{keep} tokens are to be kept of {len(cached)}"
        if keep < len(cached):
            self.rollbacks.append((feed.seq_id, len(cached) - keep))
            del cached[keep:]

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """See `Member.reuse`."""
        self._maybe_raise("reuse")
        assert seq_id not in self.cached, "a prefix begins a sequence"
        rows = [ids for ids in (*self.cached.values(), *self.kept) if ids.salt == salt]
        best = max(rows, key=lambda ids: _num_shared(ids, token_ids), default=SaltedIds())
        length = _num_shared(best, token_ids)
        length = length if length >= self.min_prefix else 0
        if length:
            self.reuses.append((seq_id, length))
            self.cached[seq_id] = SaltedIds(token_ids[:length], salt)
            if any(ids is best for ids in self.kept):
                self.kept = [ids for ids in self.kept if ids is not best] + [best]
        self._make_way()
        return length

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`."""
        self._maybe_raise("release")
        ids = self.cached.pop(seq_id, None)
        if ids and keep:
            assert seq_id not in self.fails_on | self.nan_on, "what failed is to be kept"
            self.kept.append(ids)
            self._make_way()

    def _make_way(self) -> None:
        """Prefixes have what running sequences leave."""
        while self.kept and sum(-(-len(ids) // self.page_size) for ids in self.kept) > self.free_pages:
            self.kept.pop(0)

    def _maybe_raise(self, call: str) -> None:
        if call in self.broken_calls:
            raise self.broken_calls[call]

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`."""
        return {str(self.device): 512 if self.asleep else 1024}

    def sleep(self) -> None:
        """See `Sleeper.sleep`."""
        assert not self.cached, "somebody holds a part of the cache"
        self.kept.clear()
        self.asleep = True

    def wake(self) -> None:
        """See `Sleeper.wake`."""
        self._maybe_raise("wake")
        self.asleep = False

    def close(self) -> None:
        """See `Member.close`; nothing is held elsewhere."""

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """(V,): a function of the bytes of `ids` alone."""
        text = b"".join(self.vocabulary.tokens[token_id] for token_id in ids)
        digest = hashlib.sha256(self._seed.to_bytes(4, "little") + text).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        noise = torch.randn(len(self.vocabulary), generator=generator) * 2.0
        return noise + self._prior + self._finishing_bias(text)

    def _extend(self, feed: Feed) -> list[Tensor]:
        """Cache a feed; the logits of its wanted positions."""
        assert feed.token_ids, "an empty feed"
        assert 0 <= feed.wanted <= len(feed.token_ids)
        ids = self.cached.setdefault(feed.seq_id, SaltedIds(salt=feed.salt))
        assert ids.salt == feed.salt, "a sequence has another salt than before"
        assert len(ids) + len(feed.token_ids) <= self.max_len, "a feed passes the longest sequence"
        ids.extend(feed.token_ids)
        ends = range(len(ids) - feed.wanted + 1, len(ids) + 1)
        rows = [self.next_logits(ids[:end]) for end in ends]
        return [row * torch.nan if feed.seq_id in self.nan_on else row for row in rows]

    def _make_prior(self, eos_bias: float) -> Tensor:
        prior = torch.full((len(self.vocabulary),), -30.0)
        for token_id, token in enumerate(self.vocabulary.tokens):
            if token_id in self.vocabulary.stop_ids:
                prior[token_id] = eos_bias
            elif set(token) <= _LIKELY:
                prior[token_id] = 0.0
        return prior

    def _finishing_bias(self, text: bytes) -> Tensor:
        """A begun character is gone on with."""
        bias = torch.zeros(len(self.vocabulary))
        if mid_character(text[-4:]):
            bias[0x90:0xC0] = 60.0  # after F0 the lower ones are no UTF-8
        return bias


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def mid_character(end: bytes) -> bool:
    """Whether bytes end within a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(end)
    return bool(decoder.getstate()[0])

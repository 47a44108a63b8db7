"""The contract between the engine and a member.

It is small enough that a thread, another GPU, another process or another host can stand behind it. Nothing
here knows transformers, caches, scheduling or fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ensemble_core.members.ranking import ranked
from ensemble_core.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Feed:
    """One sequence's part of a forward.

    token_ids: appended to what the member has cached of the sequence; never empty.
    wanted: answer for the last `wanted` of them (0: a prefill chunk that is not the last).
    also: for each wanted position, ids whose log-probabilities must be in the answer whatever their rank;
        empty, or as long as `wanted`.
    following: for each of token_ids the id whose log-probability after it is asked for, -1 for none; empty: none at
        all. The answer has their sum.
    top_k: candidates of each wanted position; the size of the vocabulary or more: whole distributions.
    keep: cached tokens of the sequence to keep; the member rolls back the rest before it appends. None: all.
    salt: only sequences of the same salt may take over what is cached of this one; the same in all its feeds.
    """

    seq_id: int
    token_ids: Sequence[int]
    wanted: int = 1
    also: tuple[tuple[int, ...], ...] = ()
    following: tuple[int, ...] = ()
    top_k: int = 1
    keep: int | None = None
    salt: str = ""

    def length_after(self, cached: int) -> int:
        """Tokens that are cached of the sequence once this is taken in, of which `cached` were there."""
        return (cached if self.keep is None else self.keep) + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest tokens of some positions, and the mass of the rest.

    The log-softmax behind the numbers is taken over the member's full vocabulary. A row runs from likely to unlikely,
    of equals the lowest id first, and holds the ids asked for by `also` whatever their rank; a row that holds the
    whole vocabulary is in the order of ids.
    """

    token_ids: Tensor  # (N, K) int64
    logprobs: Tensor  # (N, K) float32, exact
    tail: Tensor  # (N,) float32, log of the mass outside the K candidates; -inf where K is everything

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def rows(self, indices: Sequence[int]) -> Candidates:
        """The given rows, in the given order."""
        if list(indices) == list(range(len(self))):
            return self
        index = torch.tensor(indices, dtype=torch.long, device=self.token_ids.device)
        return Candidates(self.token_ids[index], self.logprobs[index], self.tail[index])

    def best(self, num: int) -> Candidates:
        """The `num` likeliest of each row, of equals the lowest ids; what is cut off joins the tail."""
        if self.token_ids.shape[1] <= num:
            return self
        return self.at(self.first(num))

    def first(self, num: int) -> Tensor:
        """Places (N, num) of the likeliest of each row, in order."""
        return ranked(self.logprobs, num, self.token_ids)

    def numbers(self, row: int, places: Tensor) -> Tensor:
        """Log-probabilities at some places (n,) of a row."""
        return self.logprobs[row, places]

    def at(self, places: Tensor) -> Candidates:
        """Those at the given places (N, k) of each row; what is left out joins the tail."""
        logprobs = self.logprobs.gather(1, places)
        return Candidates(self.token_ids.gather(1, places), logprobs, log_rest(logprobs))

    def to(self, device: torch.device) -> Candidates:
        """The same candidates on `device`: a few KB a row."""
        return Candidates(self.token_ids.to(device), self.logprobs.to(device), self.tail.to(device))


@dataclass(frozen=True, slots=True)
class Span:
    """Where a feed's answer lies: rows [start, stop) of a block."""

    block: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What a member answers to the feeds of one forward.

    Positions of one width lie together in a block, so that a feed that asks for a whole vocabulary costs the others
    nothing. spans: one for each feed, in their order.
    likelihoods: for each feed the sum of the log-probabilities that its `following` asks for, in nats; empty where no
    feed asks.
    clock: waits for the end of the forward and says what it took, in seconds; None: it was over when it came back.
    """

    blocks: tuple[Candidates, ...]
    spans: tuple[Span, ...]
    likelihoods: tuple[float, ...] = ()
    clock: Callable[[], float] | None = None

    def of(self, feed: int) -> Candidates:
        """The wanted positions of feed number `feed`, in order; at least one."""
        span = self.spans[feed]
        block = self.blocks[span.block]
        rows = slice(span.start, span.stop)
        return Candidates(block.token_ids[rows], block.logprobs[rows], block.tail[rows])

    def last(self, feeds: Sequence[int]) -> Candidates:
        """The last wanted position of each of `feeds`, which all asked for the same width: (len(feeds), K)."""
        spans = [self.spans[feed] for feed in feeds]
        assert len({span.block for span in spans}) == 1, "feeds of several widths have no common rows"
        return self.blocks[spans[0].block].rows([span.stop - 1 for span in spans])

    def joined(self) -> Candidates:
        """All wanted positions, feed by feed; all of the same width. No rows where nothing is wanted."""
        if not self.blocks:
            return Candidates(torch.empty(0, 0, dtype=torch.long), torch.empty(0, 0), torch.empty(0))
        (block,) = self.blocks
        return block.rows([row for span in self.spans for row in range(span.start, span.stop)])


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a member can do. Those behind another vendor's server can do less.

    max_k: most candidates of a position; None: whole vocabularies. max_also: most ids of one `also`; None: any
    number. every_position: whether answers, or `following`, can be had at every position of a long prompt. salts:
    whether what it has cached is kept apart by the salt of the request.
    """

    max_k: int | None = None
    max_also: int | None = None
    every_position: bool = True
    salts: bool = True


ALL_ABILITIES = Abilities()


def stacked(parts: Sequence[Candidates]) -> Candidates:
    """The rows of several parts of the same width, one part after the other."""
    return Candidates(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.tail for part in parts]),
    )


def log_rest(logprobs: Tensor) -> Tensor:
    """Log of the mass outside (N, K) log-probabilities, (N,) float32; NaN for a row that is not finite.

    Summed in float64, since it is a small difference.
    """
    rest = 1.0 - logprobs.double().exp().sum(dim=1)
    return torch.where(rest.isnan(), rest, rest.clamp_min(0.0)).log().float()


class Member(Protocol):
    """One resident language model with its own tokenizer and KV cache.

    `num_pages` pages of `page_size` tokens hold the cache; a sequence holds whole pages. A forward over more pages
    than are free is the scheduler's fault and trips an assertion. Prefixes that are cached beyond the running
    sequences hold no page: they make way.

    Every call may fail, and what it raises concerns the sequences of that call alone. `MemberPool` makes the calls.
    lane: members of one lane work in turn, members of different lanes at the same time.

    lost: why no call can reach the member now; None: calls are worth a try. incarnation: it has lost its cache so
    many times; what a sequence had cached in an earlier one is gone.
    """

    name: str
    vocabulary: Vocabulary
    device: torch.device
    lane: str
    abilities: Abilities

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def min_prefix(self) -> int:
        """Tokens; `reuse` takes over no shorter prefix."""

    @property
    def lost(self) -> str | None:
        """Why the member cannot be reached; always None in this process."""

    @property
    def incarnation(self) -> int:
        """How often the member has lost its cache; always 0 in this process."""

    @property
    def page_size(self) -> int:
        """Tokens a page."""

    @property
    def num_pages(self) -> int:
        """All pages, free or held."""

    @property
    def free_pages(self) -> int:
        """Pages that no running sequence holds."""

    def forward(self, feeds: Sequence[Feed]) -> Answers:
        """One packed pass over any mix of prefill, decode and verification; a sequence is fed once.

        Rollback comes first: each feed says how many cached tokens to keep. Raises MemberError if the pass fails. A
        row whose logits are not finite comes back as NaN and harms no other row.
        """

    def reuse(self, seq_id: int, token_ids: Sequence[int], salt: str = "") -> int:
        """Begin a sequence with the longest prefix of `token_ids` that a running or kept sequence has cached.

        Only of sequences with the same salt; without one, of those that have none. Returns how many tokens are cached
        now; 0: nothing has begun. Too short a prefix is not worth it. The answers that follow are those of a sequence
        that was fed all of it.
        """

    def release(self, seq_id: int, keep: bool = False) -> None:
        """Give back all pages of a sequence; an unknown one is fine.

        keep: what is cached of it may serve `reuse` until its place is needed, least recently used first; unless it
        is not finite. Never for a sequence whose forward failed.
        """

    def memory_bytes(self) -> dict[str, int]:
        """Device -> bytes of weights and cache."""

    def close(self) -> None:
        """Give up what the member holds outside this process; no call follows."""


@runtime_checkable
class Sleeper(Protocol):
    """A member that can give its memory back and have it again sooner than by loading."""

    def sleep(self) -> None:
        """Give the cache back; weights that lie on another device go to this machine's memory.

        Nobody holds anything of the cache, and no call follows but `wake`, `memory_bytes` and `close`.
        """

    def wake(self) -> None:
        """Be as just loaded. Raises what the device raises; the member then sleeps on, as far as it can."""


def ask(member: Member, feeds: Sequence[Feed], top_k: int) -> Candidates:
    """`top_k` candidates of every wanted position, feed by feed. For callers that drive a member by hand."""
    return member.forward([replace(feed, top_k=top_k) for feed in feeds]).joined()

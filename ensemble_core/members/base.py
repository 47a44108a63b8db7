"""The contract between the engine and a member.

It is small enough that a thread, another GPU, another process or another host can stand behind it. Nothing
here knows transformers, caches, scheduling or fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ensemble_core.members.ranking import ranked
from ensemble_core.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Feed:
    """One sequence's share of a forward.

    token_ids: appended to what the member has cached of the sequence; never empty.
    wanted: answer for the last `wanted` of them (0: a prefill chunk that is not the last).
    also: for each wanted position, ids whose log-probabilities must be in the answer whatever their rank;
        empty, or as long as `wanted`.
    following: for each of token_ids the id whose log-probability after it is asked for, -1 for none; empty: none at
        all. The answer has their sum.
    """

    seq_id: int
    token_ids: list[int]
    wanted: int = 1
    also: tuple[tuple[int, ...], ...] = ()
    following: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a member answers: for each wanted position its likeliest tokens, and the mass of the rest.

    Rows follow the order of the feeds, and within a feed the order of its positions. The log-softmax behind
    the numbers is taken over the member's full vocabulary. A row runs from likely to unlikely, of equals the
    lowest id first, and holds the ids asked for by `also` whatever their rank; a row that holds the whole
    vocabulary is in the order of ids.

    clock: waits for the end of the forward and says what it took, in seconds; None: it was over when it came back.
    likelihoods: for each feed the sum of the log-probabilities that its `following` asks for, in nats; empty where no
    feed asks. Not of rows that are taken out of an answer.
    """

    token_ids: Tensor  # (N, K) int64
    logprobs: Tensor  # (N, K) float32, exact
    tail: Tensor  # (N,) float32, log of the mass outside the K candidates; -inf where K is everything
    clock: Callable[[], float] | None = None
    likelihoods: tuple[float, ...] = ()

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
        return self.at(ranked(self.logprobs, num, self.token_ids))

    def at(self, places: Tensor) -> Candidates:
        """Those at the given places (N, k) of each row; what is left out joins the tail."""
        logprobs = self.logprobs.gather(1, places)
        return Candidates(self.token_ids.gather(1, places), logprobs, log_rest(logprobs))

    def to(self, device: torch.device) -> Candidates:
        """The same candidates on `device`: a few KB a row."""
        return Candidates(self.token_ids.to(device), self.logprobs.to(device), self.tail.to(device))


def log_rest(logprobs: Tensor) -> Tensor:
    """Log of the mass outside (N, K) log-probabilities, (N,) float32; NaN for a row that is not finite.

    Summed in float64, since it is a small difference.
    """
    rest = 1.0 - logprobs.double().exp().sum(dim=1)
    return torch.where(rest.isnan(), rest, rest.clamp_min(0.0)).log().float()


class Member(Protocol):
    """One resident language model with its own tokenizer and KV cache.

    `num_pages` pages of `page_size` tokens hold the cache; a sequence holds whole pages. A forward over more
    pages than are free is the scheduler's fault and trips an assertion. Prefixes that are cached beyond the running
    sequences hold no page: they make way.
    """

    name: str
    vocabulary: Vocabulary
    max_len: int
    min_prefix: int  # tokens; `reuse` takes over no shorter prefix
    device: torch.device

    @property
    def page_size(self) -> int:
        """Tokens a page."""

    @property
    def num_pages(self) -> int:
        """All pages, free or held."""

    @property
    def free_pages(self) -> int:
        """Pages that no running sequence holds."""

    def forward(self, feeds: Sequence[Feed], top_k: int) -> Candidates:
        """One packed pass over any mix of prefill, decode and verification.

        Raises MemberError if the pass fails. A row whose logits are not finite comes back as NaN and harms no
        other row.
        """

    def rollback(self, seq_id: int, length: int) -> None:
        """Keep the first `length` cached tokens of a sequence."""

    def reuse(self, seq_id: int, token_ids: Sequence[int]) -> int:
        """Begin a sequence with the longest prefix of `token_ids` that a running or kept sequence has cached.

        Returns how many tokens are cached now; 0: nothing has begun. Too short a prefix is not worth it. The answers
        that follow are those of a sequence that was fed all of it.
        """

    def release(self, seq_id: int, keep: bool = False) -> None:
        """Give back all pages of a sequence; an unknown one is fine.

        keep: what is cached of it may serve `reuse` until its place is needed, least recently used first; unless it
        is not finite. Never for a sequence whose forward failed.
        """

    def memory_bytes(self) -> dict[str, int]:
        """Device -> bytes of weights and cache."""

"""The wire form of feeds, orders and answers: named arrays in one safetensors message, never pickle.

Every message has an array `head`, int64 (2,): its kind (1 feeds, 2 answers, 3 order) and the version of this form.
Lists of different lengths lie end to end in one array, beside an array of their lengths. F feeds, R releases.

| feeds | dtype | shape | what |
|---|---|---|---|
| seq_id, wanted, top_k, keep | int64 | (F,) | as in `Feed`; keep -1: all |
| token_ids, num_token_ids | int64 | (T,), (F,) | tokens of all feeds, and how many each has |
| also_ids, num_also_ids, num_also | int64 | (I,), (P,), (F,) | ids of positions; ids a position; positions a feed |
| following, num_following | int64 | (L,), (F,) | as in `Feed` |
| salt, num_salt | int64 | (S,), (F,) | bytes of UTF-8, and how many each feed has |

| an order has the arrays of its feeds, and | dtype | shape | what |
|---|---|---|---|
| incarnation | int64 | (1,) | as in `Order` |
| cached | int64 | (F,) | as in `Order` |
| released, kept | int64 | (R,) | sequences, and 1 where what is cached of them may be kept |

| answers | dtype | shape | what |
|---|---|---|---|
| spans | int64 | (F, 3) | block, start, stop of each feed |
| token_ids.B, logprobs.B, tail.B | int32, float32, float32 | (N, K), (N, K), (N,) | block number B, from 0 on |
| likelihoods | float64 | (F,) or (0,) | as in `Answers` |
| seconds | float64 | (1,) or (0,) | what the forward took, where its clock says so |

A block of whole vocabularies in the order of ids leaves out its ids: token_ids.B has the shape (0, K).

Invariant: a message that is damaged, of another version, or contradicts itself raises WireError and nothing else.
Knows arrays; does not know transports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ensemble_core.errors import WireError
from ensemble_core.members.base import Answers, Candidates, Feed, Span

T = TypeVar("T")

VERSION = 3
_FEEDS, _ANSWERS, _ORDER = 1, 2, 3
_ALL = -1  # `keep` of a feed that keeps everything


@dataclass(frozen=True, slots=True)
class Order:
    """What a far end is asked to do in one call: releases first, then feeds.

    incarnation: which start of the far end this is for. cached: of each feed's sequence, the tokens that the far end
    must hold before it keeps or appends anything. releases: sequences to give back, and whether to keep a prefix.
    """

    incarnation: int
    feeds: list[Feed]
    cached: list[int]
    releases: list[tuple[int, bool]]


def encode_order(order: Order) -> bytes:
    """An order as one message."""
    return _message(
        _ORDER,
        **_feed_arrays(order.feeds),
        incarnation=_ints([order.incarnation]),
        cached=_ints(order.cached),
        released=_ints(seq_id for seq_id, _ in order.releases),
        kept=_ints(keep for _, keep in order.releases),
    )


def decode_order(message: bytes) -> Order:
    """The order of a message. Raises WireError."""
    arrays = _Arrays(message, _ORDER)
    feeds, cached, incarnation = _feeds(arrays), arrays.ints("cached"), arrays.ints("incarnation")
    released, kept = arrays.ints("released"), arrays.ints("kept")
    _require(
        len(cached) == len(feeds) and len(incarnation) == 1, "cached must be of every feed, incarnation one number"
    )
    _require(len(released) == len(kept), "numbers of releases differ")
    return Order(incarnation[0], feeds, cached, list(zip(released, map(bool, kept), strict=True)))


def encode_feeds(feeds: Sequence[Feed]) -> bytes:
    """Feeds as one message."""
    return _message(_FEEDS, **_feed_arrays(feeds))


def _feed_arrays(feeds: Sequence[Feed]) -> dict[str, Tensor]:
    return {
        "seq_id": _ints(feed.seq_id for feed in feeds),
        "wanted": _ints(feed.wanted for feed in feeds),
        "top_k": _ints(feed.top_k for feed in feeds),
        "keep": _ints(_ALL if feed.keep is None else feed.keep for feed in feeds),
        **_ragged("token_ids", [feed.token_ids for feed in feeds]),
        **_ragged("also_ids", [ids for feed in feeds for ids in feed.also]),
        "num_also": _ints(len(feed.also) for feed in feeds),
        **_ragged("following", [feed.following for feed in feeds]),
        **_ragged("salt", [feed.salt.encode() for feed in feeds]),
    }


def decode_feeds(message: bytes) -> list[Feed]:
    """The feeds of a message. Raises WireError."""
    return _feeds(_Arrays(message, _FEEDS))


def _feeds(arrays: _Arrays) -> list[Feed]:
    seq_id, wanted, top_k, keep = (arrays.ints(name) for name in ("seq_id", "wanted", "top_k", "keep"))
    tokens, following, salts = (arrays.ragged(name) for name in ("token_ids", "following", "salt"))
    also = _split(arrays.ragged("also_ids"), arrays.ints("num_also"), "num_also")
    _require(
        len({len(each) for each in (seq_id, wanted, top_k, keep, tokens, following, also, salts)}) == 1,
        "numbers of feeds differ",
    )
    feeds = [
        Feed(
            seq_id[i],
            tokens[i],
            wanted[i],
            tuple(map(tuple, also[i])),
            tuple(following[i]),
            top_k[i],
            None if kept == _ALL else kept,
            _text(salts[i]),
        )
        for i, kept in enumerate(keep)
    ]
    for feed in feeds:
        _check_feed(feed)
    return feeds


def encode_answers(answers: Answers) -> bytes:
    """Answers as one message; waits for the end of the forward."""
    arrays = {"spans": _ints(n for s in answers.spans for n in (s.block, s.start, s.stop)).view(-1, 3)}
    for number, block in enumerate(answers.blocks):
        rows, width = block.token_ids.shape
        in_order = torch.equal(block.token_ids.cpu(), torch.arange(width).expand(rows, width))
        token_ids = (block.token_ids[:0] if in_order else block.token_ids).int()
        arrays |= {
            f"token_ids.{number}": token_ids,
            f"logprobs.{number}": block.logprobs,
            f"tail.{number}": block.tail,
        }
    seconds = [] if answers.clock is None else [answers.clock()]
    return _message(
        _ANSWERS,
        **arrays,
        likelihoods=torch.tensor(answers.likelihoods, dtype=torch.float64),
        seconds=torch.tensor(seconds, dtype=torch.float64),
    )


def decode_answers(message: bytes) -> Answers:
    """The answers of a message, on the CPU. Raises WireError."""
    arrays = _Arrays(message, _ANSWERS)
    num_blocks = sum(name.startswith("tail.") for name in arrays.names)
    blocks = tuple(_block(arrays, number) for number in range(num_blocks))
    spans = arrays.tensor("spans", torch.int64, 2)
    _require(spans.shape[1] == 3, "spans must be (F, 3)")
    found = tuple(Span(*row) for row in spans.tolist())
    for span in found:
        most = len(blocks[span.block]) if 0 <= span.block < num_blocks else 0
        inside = span.block >= 0 and 0 <= span.start <= span.stop <= most
        _require(inside, f"{span} lies outside the blocks")
    likelihoods = tuple(arrays.tensor("likelihoods", torch.float64, 1).tolist())
    _require(len(likelihoods) in (0, len(found)), "likelihoods must be of every feed or of none")
    seconds = arrays.tensor("seconds", torch.float64, 1).tolist()
    _require(len(seconds) <= 1, "seconds must be one number or none")
    return Answers(blocks, found, likelihoods, (lambda: float(seconds[0])) if seconds else None)


def _block(arrays: _Arrays, number: int) -> Candidates:
    token_ids = arrays.tensor(f"token_ids.{number}", torch.int32, 2).long()
    logprobs = arrays.tensor(f"logprobs.{number}", torch.float32, 2)
    tail = arrays.tensor(f"tail.{number}", torch.float32, 1)
    rows, width = logprobs.shape
    _require(token_ids.shape in ((rows, width), (0, width)) and len(tail) == rows, f"block {number} is ragged")
    _require(not (token_ids < 0).any(), f"block {number} has negative ids")
    if len(token_ids) < rows:
        token_ids = torch.arange(width).expand(rows, width)
    return Candidates(token_ids, logprobs, tail)


def _text(code: list[int]) -> str:
    try:
        return bytes(code).decode()
    except ValueError as error:
        raise WireError(f"a message contradicts itself: salt is no UTF-8: {error}") from error


def _check_feed(feed: Feed) -> None:
    count = len(feed.token_ids)
    _require(0 <= feed.wanted <= count, f"{feed.wanted} positions are wanted of {count} tokens")
    _require(len(feed.also) in (0, feed.wanted), f"also has {len(feed.also)} entries for {feed.wanted} positions")
    _require(len(feed.following) in (0, count), f"following has {len(feed.following)} ids for {count} tokens")
    _require(count > 0 and min(feed.token_ids) >= 0, "token_ids must be ids, at least one")
    _require(feed.top_k >= 1 and (feed.keep or 0) >= 0, "top_k must be 1 or more, keep 0 or more")


class _Arrays:
    """The arrays of a message of the right kind and version."""

    def __init__(self, message: bytes, kind: int) -> None:
        try:
            self._arrays: dict[str, Tensor] = load(message)
        except (SafetensorError, ValueError, KeyError) as error:
            raise WireError(f"a message cannot be read: {error}") from error
        head = self.ints("head")
        _require(len(head) == 2 and head[0] == kind, f"a message of kind {kind} is expected, got head {head}")
        _require(head[1] == VERSION, f"version {VERSION} is understood, got {head[1]}; update the other side")

    @property
    def names(self) -> Iterable[str]:
        """All arrays."""
        return self._arrays.keys()

    def tensor(self, name: str, dtype: torch.dtype, num_dims: int) -> Tensor:
        """An array that must be there, of this type."""
        _require(name in self._arrays, f"array {name} is missing")
        found = self._arrays[name]
        _require(found.dtype == dtype and found.dim() == num_dims, f"array {name} is {found.dtype} {found.shape}")
        return found

    def ints(self, name: str) -> list[int]:
        """A row of whole numbers."""
        numbers: list[int] = self.tensor(name, torch.int64, 1).tolist()
        return numbers

    def ragged(self, name: str) -> list[list[int]]:
        """Lists of different lengths; see the module."""
        return _split(self.ints(name), self.ints(f"num_{name}"), name)


def _split(items: list[T], lengths: list[int], name: str) -> list[list[T]]:
    _require(min(lengths, default=0) >= 0 and sum(lengths) == len(items), f"the lengths of {name} do not add up")
    return [items[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]


def _ragged(name: str, lists: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
    return {name: _ints(n for each in lists for n in each), f"num_{name}": _ints(map(len, lists))}


def _ints(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _message(kind: int, **arrays: Tensor) -> bytes:
    head = {"head": _ints((kind, VERSION))}
    message: bytes = save({name: each.detach().cpu().contiguous() for name, each in (head | arrays).items()})
    return message


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise WireError(f"a message contradicts itself: {problem}")

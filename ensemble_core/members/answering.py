"""From the logits of a pass to the answers of its feeds.

Wanted positions are laid out so that those of one width lie together: each width is one block of candidates, made
from a view of the logits. Knows feeds and candidates; does not know models or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from torch import Tensor

from ensemble_core.members.base import Answers, Feed, Span
from ensemble_core.members.candidates import likelihoods, top_candidates
from ensemble_core.members.kernels.base import Kernels


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rows of logits belong to which feed.

    groups: for each block its feeds' numbers, in the order of their rows.
    """

    groups: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Feeds in the order of their rows."""
        return tuple(chain.from_iterable(self.groups))

    def spans(self, feeds: Sequence[Feed]) -> tuple[Span, ...]:
        """Where each feed's answer lies, if each group is a block; nothing for one that wants nothing."""
        spans = [Span(0, 0, 0)] * len(feeds)
        for number, group in enumerate(self.groups):
            start = 0
            for i in group:
                spans[i] = Span(number, start, start + feeds[i].wanted)
                start += feeds[i].wanted
        return tuple(spans)


def lay_out(feeds: Sequence[Feed]) -> Layout:
    """Rows of equal width together, otherwise in the order of the feeds; feeds that want nothing have no rows."""
    asking = sorted((i for i, feed in enumerate(feeds) if feed.wanted), key=lambda i: feeds[i].top_k)
    return Layout(tuple(tuple(group) for _, group in groupby(asking, key=lambda i: feeds[i].top_k)))


def answer(logits: Tensor, feeds: Sequence[Feed], layout: Layout, kernels: Kernels) -> Answers:
    """Candidates of every wanted position, and the likelihoods that are asked for.

    logits: (N, V), the wanted positions in the layout's order, then a row for every `following` id that is not -1,
    in the order of the feeds.
    """
    blocks, start = [], 0
    for group in layout.groups:
        also = [ids for i in group for ids in feeds[i].also or ((),) * feeds[i].wanted]
        blocks.append(top_candidates(logits[start : start + len(also)], feeds[group[0]].top_k, also, kernels))
        start += len(also)
    asked = [feed.following for feed in feeds]
    told = likelihoods(logits[start:], asked, kernels) if start < len(logits) else ()
    return Answers(tuple(blocks), layout.spans(feeds), told)

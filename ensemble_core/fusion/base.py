"""The contract of a fusion, and the registry of fusions.

A fusion is a pure function over candidates: batched, without autograd, without state, without knowledge of
requests. Row 0 of the members is always main.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel
from torch import Tensor

from ensemble_core.errors import ConfigError, quoted
from ensemble_core.members.base import Candidates
from ensemble_core.registry import Registry
from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.matrix import TransferMatrix


@dataclass(frozen=True, slots=True)
class Fused:
    """A distribution over main's vocabulary on a closed support, and the mass left outside it.

    Within a row an id may stand twice; all but one of its entries then carry -inf.
    """

    token_ids: Tensor  # (B, S) int64, main's ids
    logprobs: Tensor  # (B, S) float32; exp sums to 1 - exp(tail) in each row
    tail: Tensor  # (B,) float32, log-mass outside the support
    unmapped: Tensor  # (B, M) float32, each member's mass that found no place in the shared space


@dataclass(frozen=True, slots=True)
class Views:
    """What each member says in the space where all meet, before it is pooled.

    Places are tokens of main's vocabulary (the last place is then the mass outside the support), or anchors. A
    member's shares sum to 1. A place that no member gives anything is padding.
    """

    main: Candidates
    token_ids: Tensor  # (B, S) int64, main's ids that places stand for
    shares: Tensor  # (B, M, X) float32; X is S + 1 with a place for the mass outside, S for anchors
    weights: Tensor  # (B, M) float32, after filters and gates; rows sum to 1
    unmapped: Tensor  # (B, M) float32, as in `Fused`


class Fusion(Protocol):
    """`fuse(candidates of main and assistants, weights) -> Fused`."""

    name: str
    full_vocabulary: bool  # True: candidates must be whole distributions (K = V)

    def fuse(self, candidates: Sequence[Candidates], weights: Tensor) -> Fused:
        """Fuse M members' candidates of B rows each.

        candidates: M entries of B rows, main first. weights: (B, M) float32, rows sum to 1.
        """


class Pooled(Fusion, Protocol):
    """A fusion whose core is a weighted sum: `fuse` is `conclude(views, sum of weights times shares)`."""

    def views(self, candidates: Sequence[Candidates], weights: Tensor) -> Views:
        """What each member says; arguments as of `fuse`."""

    def conclude(self, views: Views, pooled: Tensor) -> Fused:
        """The distribution that belongs to pooled shares (B, X), whose rows sum to 1."""


@runtime_checkable
class Certifying(Protocol):
    """A fusion that can tell from main alone where no assistant can change the likeliest token."""

    def certified(self, main: Candidates, weights: Tensor) -> Tensor:
        """(B,) bool: rows in which main's likeliest token stays the likeliest, whatever assistants say.

        main: B rows. weights: (B, M) as in `fuse`; main's may be less than it will be. A row may be left out although
        it holds there, never the reverse.
        """


@runtime_checkable
class Mixture(Protocol):
    """A fusion that may be the weighted sum of all members' distributions, carried token by token to main's ids.

    Whether it is says `is_mixture` of its options.
    """

    def carried(self, member: int, token_ids: Tensor) -> Tensor:
        """Main's ids for an assistant's, (B,) -> (B,); -1 where main has none. member: its index, main being 0."""


def is_mixture(options: BaseModel) -> bool:
    """Whether a fusion with these options is a weighted sum of members' distributions, and no more than that."""
    return bool(getattr(options, "is_mixture", False))


@dataclass(frozen=True, slots=True)
class FusionSpace:
    """What the members of an ensemble look like to a fusion, main first."""

    vocabularies: Sequence[Vocabulary]
    matrices: Callable[[], Sequence[TransferMatrix]]  # loaded on demand: not every fusion needs them
    device: torch.device
    members: tuple[str, ...] = ()  # names, for options that name a member

    def index(self, member: str, option: str) -> int:
        """Where a member named by an option stands. Raises ConfigError."""
        if member not in self.members:
            raise ConfigError(
                f"fusion.options.{option}: {quoted(member)} is no member in use; allowed are {list(self.members)}"
            )
        return self.members.index(member)


ROUNDING = 1e-4  # what a certificate allows for sums in float32

FUSIONS: Registry[Callable[[FusionSpace, Any], Fusion]] = Registry("fusion")


def pooled_names() -> list[str]:
    """The names of fusions that are `Pooled`, sorted."""
    return [name for name in FUSIONS.names() if hasattr(FUSIONS.factory(name), "conclude")]


def build_fusion(name: str, options: BaseModel, space: FusionSpace) -> Fusion:
    """Instantiate a registered fusion with options from `FUSIONS.parse`."""
    return FUSIONS.factory(name)(space, options)


def linear_pool(weights: Tensor, shares: Tensor) -> Tensor:
    """The weighted sum over members, (B, M) and (B, M, X) -> (B, X), in their order whatever the batch."""
    pooled = shares[:, 0] * weights[:, :1]
    for member in range(1, shares.shape[1]):
        pooled.addcmul_(shares[:, member], weights[:, member : member + 1])
    return pooled


def lead(main: Candidates) -> tuple[Tensor, Tensor]:
    """The log-probabilities of each row's likeliest and second token, (B,) each; -inf where there is no second."""
    best = main.logprobs.topk(min(2, main.logprobs.shape[1]), dim=1).values
    second = best[:, 1] if best.shape[1] > 1 else torch.full_like(best[:, 0], -torch.inf)
    return best[:, 0], second


def single(candidates: Candidates) -> Fused:
    """One member alone passes through untouched."""
    unmapped = torch.zeros(len(candidates), 1, device=candidates.tail.device)
    return Fused(candidates.token_ids, candidates.logprobs, candidates.tail, unmapped)

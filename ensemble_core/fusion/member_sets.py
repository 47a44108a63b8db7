"""Sets of members, one for each place of each row: a bit a member, eight members an octet.

A fusion asks how many sets each member is in, and what the numbers of a set's members add up to. Both are read from a
table of all subsets of eight members. So the cost grows with the places and with the members, but hardly with their
product: one look at a place serves eight members.

Sums are taken in the order of members, whatever the batch, so rows do not depend on each other. Knows no tokens and
no masses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_EIGHT = 8


@dataclass(frozen=True, slots=True)
class MemberSets:
    """Sets of the members 0 to M - 1."""

    octets: Tensor  # (G, B, S) uint8; bit i of octet g: member 8 g + i
    num_members: int

    @classmethod
    def of_flags(cls, flags: Iterable[Tensor]) -> MemberSets:
        """From one (B, S) bool a member: whether it is in each set."""
        octets: list[Tensor] = []
        num_members = 0
        for num_members, flag in enumerate(flags, start=1):
            bit = (num_members - 1) % _EIGHT
            if bit == 0:
                octets.append(torch.zeros_like(flag, dtype=torch.uint8))
            octets[-1] |= flag.to(torch.uint8) << bit
        return cls(torch.stack(octets), num_members)

    @classmethod
    def of_places(cls, places: Iterable[Tensor], num_places: int) -> MemberSets:
        """From M of (B, K) int64: at which places of its row a member is in the set; `num_places` for none."""
        octets: list[Tensor] = []
        num_members = 0
        for num_members, own in enumerate(places, start=1):
            bit = (num_members - 1) % _EIGHT
            if bit == 0:
                octets.append(torch.zeros(own.shape[0], num_places + 1, dtype=torch.uint8, device=own.device))
            octets[-1].scatter_(1, own, octets[-1].gather(1, own) | 1 << bit)
        return cls(torch.stack(octets)[..., :-1], num_members)

    def at(self, places: Tensor) -> MemberSets:
        """The sets at some places of each row, (B, P) int64; a single row of sets (1, S) is every row's."""
        octets, (num_rows, _) = self.octets, places.shape
        octets = octets.expand(-1, num_rows, -1).gather(2, places.expand(len(octets), -1, -1))
        return MemberSets(octets, self.num_members)

    def without(self, other: MemberSets) -> MemberSets:
        """Members that are not in the other sets."""
        return MemberSets(self.octets & ~other.octets, self.num_members)

    def where(self, places: Tensor) -> MemberSets:
        """Empty where `places` (B, S) is False."""
        return MemberSets(self.octets * places, self.num_members)

    def has(self, member: int) -> Tensor:
        """Which sets a member is in, (B, S) bool."""
        return (self.octets[member // _EIGHT] >> member % _EIGHT & 1).bool()

    def meets(self, chosen: Tensor) -> Tensor:
        """Which sets have one of each row's chosen members: (B, M) bool -> (B, S) bool."""
        parts = zip(torch.split(chosen, _EIGHT, dim=1), self.octets, strict=True)
        met = [octet & _octet_of(own) for own, octet in parts]
        return (met[0] if len(met) == 1 else torch.stack(met).amax(dim=0)) > 0

    def sums(self, numbers: Tensor) -> Tensor:
        """What the numbers of a set's members add up to: (B, M) -> (B, S)."""
        parts = [
            _subset_sums(own).gather(1, octet.long())
            for own, octet in zip(torch.split(numbers, _EIGHT, dim=1), self.octets, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)

    def counts(self) -> Tensor:
        """How many of a row's sets each member is in, (B, M) int64."""
        parts = []
        for first, octet in zip(range(0, self.num_members, _EIGHT), self.octets, strict=True):
            subsets = _subsets(min(_EIGHT, self.num_members - first), octet.device)
            found = torch.zeros(len(octet), len(subsets), dtype=torch.float64, device=octet.device)
            found.scatter_add_(1, octet.long(), found.new_ones(()).expand(octet.shape))
            parts.append(found @ subsets)  # whole numbers, so the order of sums does not matter
        return torch.cat(parts, dim=1).long()


@lru_cache
def _subsets(num: int, device: torch.device) -> Tensor:
    """Which of n members are in each subset, by its bits: (2^n, n) float64 of 0 and 1."""
    subsets = torch.arange(2**num, device=device).unsqueeze(1)
    return (subsets >> torch.arange(num, device=device) & 1).double()


def _octet_of(flags: Tensor) -> Tensor:
    """(B, n) bool -> (B, 1) uint8."""
    bits = torch.arange(flags.shape[1], dtype=torch.uint8, device=flags.device)
    return (flags.to(torch.uint8) << bits).sum(dim=1, keepdim=True, dtype=torch.uint8)


def _subset_sums(numbers: Tensor) -> Tensor:
    """The sum of every subset of a row's n numbers, by the subset's bits: (B, n) -> (B, 2^n)."""
    sums = torch.zeros_like(numbers[:, :1])
    for number in torch.split(numbers, 1, dim=1):
        sums = torch.cat([sums, sums + number], dim=1)
    return sums

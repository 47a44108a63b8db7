"""Weights of each place from what members' candidates show there: `weighting: gate`.

    w_i ~ v_i exp(g_i),  g_i = b_i + o_i . tanh(A_i x_i + c_i)

with v_i the recipe's weights, x_i the evidence of member i (`evidence.py`), each number standardised and held within
`REACH`. A, c, o and b are learnt for each member by name (`fitting/fit_gate.py`). With g = 0 a gate is the weights
that the recipe has; a member without weight has none with a gate, either.

Pure: rows do not touch each other, and the order of members means nothing. Does not know fusions, requests or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.evidence import Evidence
from ensemble_core.members.base import Candidates

REACH = 4.0  # standard deviations


@dataclass(frozen=True, slots=True)
class GateNumbers:
    """What is learnt, a row for each member; float32."""

    mean: Tensor  # (M, F) of the evidence, where it was learnt
    spread: Tensor  # (M, F), greater than 0
    inner: Tensor  # (M, F, H): A
    shift: Tensor  # (M, H): c
    outer: Tensor  # (M, H): o
    bias: Tensor  # (M,): b

    def among(self, places: Sequence[int]) -> GateNumbers:
        """Of some members, by their places."""
        index = torch.tensor(places, device=self.bias.device)
        return GateNumbers(*(getattr(self, each.name)[index] for each in fields(self)))

    def to(self, device: torch.device) -> GateNumbers:
        """The same on `device`."""
        return GateNumbers(*(getattr(self, each.name).to(device) for each in fields(self)))

    def standardised(self, evidence: Tensor) -> Tensor:
        """(B, M, F) -> (B, M, F)."""
        return ((evidence - self.mean) / self.spread).clamp(-REACH, REACH)

    def logits(self, standardised: Tensor) -> Tensor:
        """g of (B, M, F), (B, M). The same sums in the same order, whatever the batch."""
        inside = (standardised.unsqueeze(3) * self.inner).sum(dim=2) + self.shift
        return (inside.tanh() * self.outer).sum(dim=2) + self.bias


class WeightGate:
    """See the module. Over some members of one ensemble, main first."""

    def __init__(self, members: tuple[str, ...], evidence: Evidence, numbers: GateNumbers) -> None:
        self._members = members
        self._evidence = evidence
        self._numbers = numbers
        self._fewer: dict[tuple[str, ...], WeightGate] = {members: self}

    @classmethod
    def over(cls, space: FusionSpace, numbers: GateNumbers) -> WeightGate:
        """numbers: in the order of the space's members."""
        return cls(space.members, Evidence(space), numbers.to(space.device))

    def weigh(self, candidates: Sequence[Candidates], weights: Tensor) -> Tensor:
        """The weights at each row, (B, M), rows sum to 1. Arguments as of `Fusion.fuse`; NaN where a member's are."""
        logits = self._numbers.logits(self._numbers.standardised(self._evidence.of(candidates)))
        return (logits + weights.log()).softmax(dim=1)

    def among(self, members: tuple[str, ...]) -> WeightGate:
        """The gate of some members, main first, two or more; the same object each time."""
        if members not in self._fewer:
            places = [self._members.index(member) for member in members]
            gate = WeightGate(members, self._evidence.among(places), self._numbers.among(places))
            self._fewer.setdefault(members, gate)
        return self._fewer[members]

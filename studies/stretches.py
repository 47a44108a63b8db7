"""Documents cut at the places where all members have a boundary, and what each member says of every stretch between.

A stretch is spelt by each member in tokens of its own, one or more; its likelihood is the product of theirs. Choosing
a member for each stretch by its weight gives it the probability sum_i w_i P_i(stretch). Any finer alphabet
(bytes, common tokens) gives the same, if weights are carried: after the symbols x of a stretch they are w_i P_i(x),
normalised, so that the product over symbols telescopes. No member is main. With equal vocabularies a stretch is a
token, and this is the linear pool. Knows stored scores alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_core.evaluation.mixture import fit_mixture
from ensemble_core.evaluation.offline import FusedPositions, SharedPositions, shared_positions
from ensemble_core.evaluation.scores import MemberScores, Scores
from ensemble_core.evaluation.weights import Weights

_MOST_BYTES = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Stretches:
    """S stretches in the order of the text. logprobs: each member's; num_tokens: how many it takes."""

    document: Tensor  # (S,) int64
    logprobs: Tensor  # (S, M) float64
    num_tokens: Tensor  # (S, M) int64
    num_documents: int

    def nats(self, weights: Weights) -> Tensor:
        """(S,) -log sum_i w_i P_i."""
        return -torch.logsumexp(self.logprobs + torch.tensor(weights, dtype=torch.float64).log(), dim=1)

    def best_nats(self) -> Tensor:
        """(S,) of the member that finds a stretch likelier: what no weights can beat."""
        return -self.logprobs.amax(dim=1)

    def tuned(self) -> Weights:
        """The weights with the fewest nats."""
        return fit_mixture((self.logprobs - self.logprobs.amax(dim=1, keepdim=True)).exp())

    def summed(self, values: Tensor) -> Tensor:
        """(S,) values summed by document, (D,)."""
        return torch.zeros(self.num_documents, dtype=torch.float64).index_add_(0, self.document, values.double())


def stretches(scores: Scores, members: Sequence[str]) -> Stretches:
    """The stretches of all scored text. members: in the order of columns."""
    starts = shared_starts(scores, members)
    logprobs = torch.zeros(len(starts), len(members), dtype=torch.float64)
    num_tokens = torch.zeros(len(starts), len(members), dtype=torch.long)
    for column, member in enumerate(members):
        part = scores.members[member]
        at = stretch_of(part, starts)[part.scored]
        logprobs[:, column].index_add_(0, at, part.logprob[part.scored].double())
        num_tokens[:, column].index_add_(0, at, torch.ones_like(at))
    return Stretches(starts >> 32, logprobs, num_tokens, len(scores))


def shared_starts(scores: Scores, members: Sequence[str]) -> Tensor:
    """(S,) int64, ascending: where stretches begin, as `order_of` numbers places."""
    main = scores.members[members[0]]
    rows = shared_positions(scores, members).rows
    return order_of(main)[rows[main.scored[rows]]]


def order_of(part: MemberScores) -> Tensor:
    """(N,) int64: places as numbers that grow with the document and along its text."""
    return part.document.long() << 32 | (_MOST_BYTES - part.rest.long())


def stretch_of(part: MemberScores, starts: Tensor) -> Tensor:
    """(N,) the stretch that each of a member's rows lies in; -1 before the first one."""
    return torch.searchsorted(starts, order_of(part), right=True) - 1


def fused_nats(
    scores: Scores, main: str, shared: SharedPositions, fused: FusedPositions, starts: Tensor
) -> Tensor:
    """(S,) what a fusion at shared places costs a stretch: main's tokens, the first of them fused."""
    part = scores.members[main]
    logprobs = part.logprob.double().index_put((shared.rows,), fused.logprobs.double())
    at = stretch_of(part, starts)[part.scored]
    return torch.zeros(len(starts), dtype=torch.float64).index_add_(0, at, -logprobs[part.scored])

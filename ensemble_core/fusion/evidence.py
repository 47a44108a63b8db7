"""What members' candidates show of one place: the numbers from which a gate sets the weights there.

Of each member the likeliest `NUM_LEADING` tokens are read, whatever K is, and the rest as one more place. So numbers
do not depend on K, on ids that a request pins, or on other rows. Tokens of all members are compared as main's ids.

- A member's own numbers: log-probability and lead of its first token, entropy, log-mass of the rest, how long the
  first token is, and how much of its mass goes to tokens of each kind (`_kind`).
- Of two members: whether their first tokens are one, what each gives the other's first one, and how much their
  distributions overlap (the Bhattacharyya coefficient).

A member's row has its own numbers, the mean of the others' own, and the mean of what it has with them. So the order
of members means nothing, and any number of them gives as many numbers. Does not know weights, gates or what is
learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.mapping import UNMAPPED, token_map
from ensemble_core.members.base import Candidates
from ensemble_core.text.vocabulary import Vocabulary

VERSION = "1"  # of the numbers: an artefact is used with those that it was learnt from
NUM_LEADING = 16
OWN = ("first", "lead", "entropy", "rest", "length", "space", "newline", "digit", "letter", "other", "control")
SHARED = ("agree", "given", "gives", "overlap")
NAMES = (*OWN, *(f"others' {name}" for name in OWN), *SHARED)
_NUM_KINDS = 6
_LEAST_MASS = 6e-6  # what is less likely is as good as impossible: log -12
_TINY = 1e-5


class Evidence:
    """See the module. Made for members of one ensemble, main first."""

    def __init__(self, space: FusionSpace) -> None:
        main, *assistants = space.vocabularies
        maps = [None, *(token_map(each, main).to(space.device) for each in assistants)]
        looks = [_looks(_Known(each.fingerprint, each)) for each in space.vocabularies]
        self._witnesses = [
            _Witness(len(kinds), places, kinds.to(space.device), lengths.to(space.device))
            for places, (kinds, lengths) in zip(maps, looks, strict=True)
        ]

    def among(self, places: Sequence[int]) -> Evidence:
        """The same of some members, by their places; main's comes first."""
        found = object.__new__(Evidence)
        found._witnesses = [self._witnesses[place] for place in places]
        return found

    def of(self, candidates: Sequence[Candidates]) -> Tensor:
        """(B, M, F) float32 from members' candidates of B rows each, main first, M >= 2; F is len(NAMES)."""
        own, ids, chances = self._own(candidates)
        num = own.shape[1]
        others = (own.sum(dim=1, keepdim=True) - own) / (num - 1)
        return torch.cat([own, others, _shared(ids, chances)], dim=2)

    def _own(self, candidates: Sequence[Candidates]) -> tuple[Tensor, Tensor, Tensor]:
        """Own numbers (B, M, OWN), main's ids of leading tokens (B, M, N), and their probabilities (B, M, N)."""
        heard = [witness.leading(part) for witness, part in zip(self._witnesses, candidates, strict=True)]
        ids, kinds, logs, length = (torch.stack(parts, dim=1) for parts in zip(*heard, strict=True))
        chances = logs.exp()
        rest = (1.0 - chances.sum(dim=2, keepdim=True)).clamp_min_(_LEAST_MASS)
        every = torch.cat([chances, rest], dim=2).clamp_min_(_LEAST_MASS)
        all_logs = every.log()
        entropy = torch.linalg.vecdot(every, all_logs).neg_().unsqueeze(2)
        mass = chances.new_zeros(*ids.shape[:2], _NUM_KINDS).scatter_add_(2, kinds, chances)
        first, second = all_logs[:, :, :1], all_logs[:, :, 1:2]
        own = torch.cat([first, first - second, entropy, all_logs[:, :, -1:], length, mass], dim=2)
        return own, ids, chances


@dataclass(frozen=True, slots=True)
class _Witness:
    """What is known of a member. places: its tokens as main's ids, None for main."""

    size: int
    places: Tensor | None  # (V,) int64
    kinds: Tensor  # (V,) int64
    lengths: Tensor  # (V,) float32

    def leading(self, part: Candidates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row's first tokens main's ids, kinds, log-probabilities (B, N); the first one's length (B, 1)."""
        if part.token_ids.shape[1] >= self.size:  # a whole vocabulary is in the order of ids
            part = part.best(NUM_LEADING)
        ids, logs = part.token_ids[:, :NUM_LEADING], part.logprobs[:, :NUM_LEADING]
        places = ids if self.places is None else self.places[ids]
        kinds, length = self.kinds[ids], self.lengths[ids[:, :1]]
        if (short := NUM_LEADING - ids.shape[1]) > 0:  # a small vocabulary, or few candidates
            places, kinds = pad(places, (0, short), value=UNMAPPED), pad(kinds, (0, short))
            logs = pad(logs, (0, short), value=-torch.inf)
        return places, kinds, logs, length


@lru_cache(maxsize=32)
def _pairs(num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Who meets whom: (pairs,) int64 each."""
    with torch.inference_mode(False):
        left, right = torch.triu_indices(num, num, 1, device=device)
        return left, right


def _shared(ids: Tensor, chances: Tensor) -> Tensor:
    """What each member has with the others, on average: (B, M, N) -> (B, M, SHARED). Each pair is looked at once."""
    num = ids.shape[1]
    left, right = _pairs(num, ids.device)
    placed = torch.where(ids >= 0, chances, 0.0)
    mine, theirs = placed.index_select(1, left), placed.index_select(1, right)  # (B, pairs, N)
    one = ids.index_select(1, left).unsqueeze(3) == ids.index_select(1, right).unsqueeze(2)  # (B, pairs, N, N)
    given = (torch.where(one[:, :, 0], theirs, 0.0).sum(dim=2) + _TINY).log()
    gives = (torch.where(one[:, :, :, 0], mine, 0.0).sum(dim=2) + _TINY).log()
    overlap = (torch.where(one, theirs.sqrt().unsqueeze(2), 0.0).sum(dim=3) * mine.sqrt()).sum(dim=2)
    agree = one[:, :, 0, 0].float()
    here = torch.stack([agree, given, gives, overlap], dim=2)
    there = torch.stack([agree, gives, given, overlap], dim=2)
    if num == 2:  # the only pair
        return torch.cat([here, there], dim=1)
    found = chances.new_zeros(len(ids), num, len(SHARED))
    return found.index_add_(1, left, here).index_add_(1, right, there) / (num - 1)


@dataclass(frozen=True, slots=True)
class _Known:
    """A vocabulary, known by what it means."""

    fingerprint: str
    vocabulary: Vocabulary = field(compare=False)


@lru_cache(maxsize=32)
def _looks(known: _Known) -> tuple[Tensor, Tensor]:
    """Of a vocabulary's tokens the kinds (V,) int64 and the lengths (V,) float32. Kept for later gates."""
    texts = [known.vocabulary.text_bytes(token_id) for token_id in range(len(known.vocabulary))]
    lengths = torch.tensor([min(len(text), 16) / 4 for text in texts])
    return torch.tensor([_kind(text) for text in texts]), lengths


def _kind(text: bytes) -> int:
    """Which of the kinds a token is: space, newline, digit, letter, other, control."""
    begin = text[:1]
    if not begin:
        return 5
    if begin.isspace():
        return 0 if begin == b" " else 1
    if begin.isdigit():
        return 2
    return 3 if begin.isalpha() or begin >= b"\x80" else 4

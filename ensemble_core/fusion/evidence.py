"""What members' candidates show of one place: the numbers from which a gate sets the weights there.

Of each member the likeliest `NUM_LEADING` tokens are read, whatever K is, and the rest as one more place. So numbers
do not depend on K, on ids that a request pins, or on other rows. Tokens of all members are compared as main's ids.

- A member's own numbers: log-probability and lead of its first token, entropy, log-mass of the rest, how long the
  first token is, and how much of its mass goes to tokens of each kind (`_kinds`).
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
from ensemble_core.members.base import Candidates, log_rest
from ensemble_core.text.vocabulary import Vocabulary

VERSION = "1"  # of the numbers: an artefact is used with those that it was learnt from
NUM_LEADING = 16
OWN = ("first", "lead", "entropy", "rest", "length", "space", "newline", "digit", "letter", "other", "control")
SHARED = ("agree", "given", "gives", "overlap")
NAMES = (*OWN, *(f"others' {name}" for name in OWN), *SHARED)
_LEAST = -12.0  # of log-probabilities: what is less likely is as good as impossible
_TINY = 1e-5


class Evidence:
    """See the module. Made for members of one ensemble, main first."""

    def __init__(self, space: FusionSpace) -> None:
        main, *assistants = space.vocabularies
        maps = [None, *(token_map(each, main).to(space.device) for each in assistants)]
        kinds = [_kinds(each).to(space.device) for each in space.vocabularies]
        self._witnesses = [_Witness(len(k), m, k) for k, m in zip(kinds, maps, strict=True)]

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
        ids, kinds, logs = (torch.stack(parts, dim=1) for parts in zip(*heard, strict=True))
        rest = log_rest(logs.flatten(0, 1)).view(logs.shape[:2]).clamp_min(_LEAST).unsqueeze(2)
        chances, every = logs.exp(), torch.cat([logs.clamp_min(_LEAST), rest], dim=2)
        entropy = -(every.exp() * every).sum(dim=2, keepdim=True)
        mass = (chances.unsqueeze(3) * kinds[..., 1:]).sum(dim=2)
        first, second = every[:, :, :1], every[:, :, 1:2]
        own = torch.cat([first, first - second, entropy, rest, kinds[:, :, 0, :1], mass], dim=2)
        return own, ids, chances


@dataclass(frozen=True, slots=True)
class _Witness:
    """What is known of a member. places: its tokens as main's ids, None for main. kinds: see `_kinds`."""

    size: int
    places: Tensor | None  # (V,) int64
    kinds: Tensor  # (V, 1 + kinds)

    def leading(self, part: Candidates) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row's first tokens main's ids (B, N), kinds (B, N, 1 + kinds) and log-probabilities (B, N)."""
        if part.token_ids.shape[1] >= self.size:  # a whole vocabulary is in the order of ids
            part = part.best(NUM_LEADING)
        ids, logs = part.token_ids[:, :NUM_LEADING], part.logprobs[:, :NUM_LEADING]
        places = ids if self.places is None else self.places[ids]
        kinds = self.kinds[ids]
        if (short := NUM_LEADING - ids.shape[1]) > 0:  # a small vocabulary, or few candidates
            places = pad(places, (0, short), value=UNMAPPED)
            logs, kinds = pad(logs, (0, short), value=-torch.inf), pad(kinds, (0, 0, 0, short))
        return places, kinds, logs


def _shared(ids: Tensor, chances: Tensor) -> Tensor:
    """What each member has with the others, on average: (B, M, N) -> (B, M, SHARED)."""
    num = ids.shape[1]
    placed = torch.where(ids >= 0, chances, 0.0)
    one = (ids[:, :, None, :, None] == ids[:, None, :, None, :]).float()  # (B, M, M, N, N)
    agree = one[..., 0, 0]
    given = (
        (one[..., 0, :] * placed[:, None]).sum(dim=3) + _TINY
    ).log()  # (B, i, j): what j gives i's first token
    roots = placed.sqrt()
    overlap = ((one @ roots[:, None, :, :, None]).squeeze(4) * roots[:, :, None]).sum(dim=3)
    pairs = torch.stack([agree, given, given.transpose(1, 2), overlap], dim=3)  # (B, M, M, SHARED)
    itself = torch.diagonal(pairs, dim1=1, dim2=2).transpose(1, 2)
    return (pairs.sum(dim=2) - itself) / (num - 1)


def _kinds(vocabulary: Vocabulary) -> Tensor:
    """(V, 1 + kinds) float32: how long a token is, and its kind by what it begins with. Kept for later gates."""
    return _kinds_of(_Known(vocabulary.fingerprint, vocabulary))


@dataclass(frozen=True, slots=True)
class _Known:
    """A vocabulary, known by what it means."""

    fingerprint: str
    vocabulary: Vocabulary = field(compare=False)


@lru_cache(maxsize=32)
def _kinds_of(known: _Known) -> Tensor:
    texts = [known.vocabulary.text_bytes(token_id) for token_id in range(len(known.vocabulary))]
    rows = torch.zeros(len(texts), len(OWN) - 4)
    rows[:, 0] = torch.tensor([min(len(text), 16) / 4 for text in texts])
    return rows.scatter_(1, torch.tensor([[_kind(text)] for text in texts]), 1.0)


def _kind(text: bytes) -> int:
    """Which of the kinds a token is, from 1: space, newline, digit, letter, other, control."""
    begin = text[:1]
    if not begin:
        return 6
    if begin.isspace():
        return 1 if begin == b" " else 2
    if begin.isdigit():
        return 3
    return 4 if begin.isalpha() or begin >= b"\x80" else 5

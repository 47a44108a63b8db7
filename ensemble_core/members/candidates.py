"""From logits to candidates: the K likeliest ids of each row with exact log-probabilities, and the tail.

Large vocabularies make this a cost of its own, so logits are surveyed once: the normaliser with a float32 sum and no
float copy of the logits, and the peaks of stripes, through which the likeliest are found.

Candidates stand in the order of `ranking`, by the log-probabilities that they carry: a row is a prefix of the same
row with more candidates, bit for bit, and does not depend on the other rows. A large vocabulary is computed only
where somebody reads all of it. Knows no model and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ensemble_core.members.base import Candidates, log_rest
from ensemble_core.members.kernels.base import Kernels, Survey
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.members.ranking import has_stripes, ranked


def likeliest(logits: Tensor, num: int, found: Survey, kernels: Kernels = PLAIN) -> Tensor:
    """The `num` likeliest ids of each row, in order; see `Kernels.likeliest`."""
    if has_stripes(logits.shape[1], num):
        return kernels.likeliest(logits, num, found)
    return ranked(logits.float() - found.normaliser.unsqueeze(1), num)


def top_candidates(
    logits: Tensor, top_k: int, also: Sequence[tuple[int, ...]] = (), kernels: Kernels = PLAIN
) -> Candidates:
    """The `top_k` likeliest ids of each row of `logits` (N, V), and those asked for by `also` (N entries or none).

    An id of `also` that is not among the likeliest takes the place of the unlikeliest that nobody asked for. The
    answer is as wide as the longest entry of `also` if that is longer than `top_k`. Rows run from likely to unlikely,
    of equals the lowest id first, ids of `also` included. A width of V or more: whole distributions in the order of
    ids, tail -inf. A row that is not finite comes back as NaN.
    """
    found = kernels.survey(logits)
    normaliser, vocabulary = found.normaliser, logits.shape[1]
    width = _width(top_k, also)
    if width >= vocabulary:
        whole = Whole(logits, found, kernels)
        return whole if logits.device.type == "cpu" and has_stripes(vocabulary, 1) else whole.computed()
    token_ids = likeliest(logits, width, found, kernels)
    for row, wanted in enumerate(also):
        if wanted:
            _force(token_ids[row], wanted)
    logprobs = logits.gather(1, token_ids).float() - normaliser.unsqueeze(1)
    candidates = Candidates(token_ids, logprobs, log_rest(logprobs))
    return in_order(candidates) if any(also) else candidates


class Whole(Candidates):
    """Whole vocabularies in the order of ids, whose log-probabilities are computed where they are read.

    Who reads all of them pays for a pass over all; who asks for the likeliest, or for those of some ids, does not.
    Holds the logits, which on a GPU may be overwritten by the next forward.
    """

    _logits: Tensor
    _found: Survey
    _kernels: Kernels

    def __init__(self, logits: Tensor, found: Survey, kernels: Kernels) -> None:
        """logits: (N, V); found: their survey."""
        rows, vocabulary = logits.shape
        ids = torch.arange(vocabulary, device=logits.device).expand(rows, vocabulary)
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "tail", torch.full_like(found.normaliser, -torch.inf))
        vars(self).update(_logits=logits, _found=found, _kernels=kernels)

    @cached_property
    def logprobs(self) -> Tensor:
        """(N, V) float32."""
        return self._logits.float() - self._found.normaliser.unsqueeze(1)

    def computed(self) -> Candidates:
        """The same without the logits."""
        return Candidates(self.token_ids, self.logprobs, self.tail)

    def rows(self, indices: Sequence[int]) -> Candidates:
        """See `Candidates.rows`."""
        if list(indices) == list(range(len(self))):
            return self
        index = torch.tensor(indices, dtype=torch.long, device=self._logits.device)
        found = Survey(self._found.normaliser[index], self._found.peaks[index])
        return Whole(self._logits[index], found, self._kernels)

    def first(self, num: int) -> Tensor:
        """See `Candidates.first`."""
        return likeliest(self._logits, min(num, self._logits.shape[1]), self._found, self._kernels)

    def numbers(self, row: int, places: Tensor) -> Tensor:
        """See `Candidates.numbers`."""
        return self._logits[row, places].float() - self._found.normaliser[row]

    def at(self, places: Tensor) -> Candidates:
        """See `Candidates.at`."""
        logprobs = self._logits.gather(1, places).float() - self._found.normaliser.unsqueeze(1)
        return Candidates(places, logprobs, log_rest(logprobs))


def likelihoods(
    logits: Tensor, following: Sequence[tuple[int, ...]], kernels: Kernels = PLAIN
) -> tuple[float, ...]:
    """For each feed the sum of the log-probabilities of its `following` ids, without a search for the likeliest.

    logits: (N, V), a row for every id that is not -1, in the order of feeds and positions. Each is rounded to 2^-30
    nats and summed in float64, which is exact: so the sum of a prompt does not depend on where it was cut.
    """
    asked = [[token_id for token_id in ids if token_id >= 0] for ids in following]
    columns = torch.tensor([token_id for ids in asked for token_id in ids], dtype=torch.long, device=logits.device)
    own = logits.gather(1, columns.unsqueeze(1)).squeeze(1).float() - kernels.survey(logits).normaliser  # (N,)
    parts = torch.split((own.double() * 2**30).round() / 2**30, [len(ids) for ids in asked])
    return tuple(torch.stack([part.sum() for part in parts]).tolist())


def narrow(candidates: Candidates, num: int, keep: Sequence[tuple[int, ...]]) -> Candidates:
    """The `num` likeliest of each row as `Candidates.best`, and the ids of `keep` (N entries) as with `also`.

    Every id of `keep` must be among the row's candidates.
    """
    width = _width(num, keep)
    if candidates.token_ids.shape[1] <= width or not any(keep):
        return candidates.best(width)
    token_ids, kept = candidates.token_ids, torch.zeros_like(candidates.logprobs, dtype=torch.bool)
    for row, wanted in enumerate(keep):
        if wanted:
            kept[row, columns_of(token_ids[row], torch.tensor(wanted, device=token_ids.device))] = True
    return in_order(candidates.at(ranked(candidates.logprobs.masked_fill(kept, torch.inf), width, token_ids)))


def _width(num: int, asked: Sequence[tuple[int, ...]]) -> int:
    """Columns that hold the `num` likeliest, and all that is asked for of any row."""
    return max(num, max((len(set(wanted)) for wanted in asked), default=0))


def columns_of(have: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` (K,) stands in `have` (W,), which holds all of them."""
    if int(wanted.max()) < have.shape[0] and bool((have[wanted] == wanted).all()):
        return wanted  # a whole vocabulary in the order of ids
    return (wanted.unsqueeze(1) == have.unsqueeze(0)).int().argmax(dim=1)


def _force(token_ids: Tensor, wanted: tuple[int, ...]) -> None:
    """Put missing `wanted` ids into the last places of a row (K,) that hold others, in place."""
    ids, asked = token_ids.tolist(), set(wanted)
    missing = asked.difference(ids)
    if missing:
        spare = (place for place in reversed(range(len(ids))) if ids[place] not in asked)
        for place, token_id in zip(spare, missing, strict=False):
            ids[place] = token_id
        token_ids.copy_(torch.tensor(ids))


def in_order(candidates: Candidates) -> Candidates:
    """The same with each row from likely to unlikely, of equals the lowest id first."""
    num = candidates.token_ids.shape[1]
    return candidates.at(ranked(candidates.logprobs, num, candidates.token_ids))

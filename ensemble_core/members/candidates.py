"""From logits to candidates: the K likeliest ids of each row with exact log-probabilities, and the tail.

Large vocabularies make this a cost of its own, so logits are surveyed once: the normaliser with a float32 sum and no
float copy of the logits, and the peaks of stripes of columns, through which the likeliest are found. On CPU that is
one compiled loop. Knows no model and no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_core.members.base import Candidates, log_rest
from ensemble_core.members.kernels import compiled

_CHUNK = 65_536  # columns that the normaliser takes at once
_STRIPE = 16  # columns that the search for the likeliest takes together


class Survey(NamedTuple):
    """What one reading of logits (N, V) tells.

    normaliser: (N,) float32, log of the sum of exp over columns. peaks: (N, stripes), the largest of each stripe:
    columns are in parts of 16 * beside, and a stripe is every `beside`-th column of a part; a few last columns are in
    none.
    """

    normaliser: Tensor
    peaks: Tensor
    beside: int


def survey(logits: Tensor) -> Survey:
    """Read logits once, (N, V) of any float dtype. The normaliser of a row that is not finite is NaN."""
    if compiled.serves(logits.device, logits.dtype):
        from ensemble_core.members.kernels.compiled.logits import survey_logits

        return Survey(*survey_logits(logits, _STRIPE))
    beside = logits.shape[1] // _STRIPE
    peaks = logits[:, : beside * _STRIPE].view(len(logits), _STRIPE, beside).amax(dim=1)
    return Survey(log_normaliser(logits), peaks, beside)


def log_normaliser(logits: Tensor) -> Tensor:
    """Log of the sum of exp over columns, (N, V) any float dtype -> (N,) float32."""
    peak = logits.amax(dim=1, keepdim=True).float()
    total = torch.zeros_like(peak)
    buffer = torch.empty(len(logits), min(_CHUNK, logits.shape[1]), device=logits.device)
    for chunk in torch.split(logits, _CHUNK, dim=1):
        part = buffer[:, : chunk.shape[1]]
        total += part.copy_(chunk).sub_(peak).exp_().sum(dim=1, keepdim=True)
    return (peak + total.log()).squeeze(1)


def likeliest(logits: Tensor, num: int, found: Survey) -> Tensor:
    """Columns of the `num` largest of each row, largest first: (N, V) -> (N, num) int64.

    The largest stand in the `num` stripes with the largest peaks, since each of those holds a number that is no
    smaller than anything in the others; so the search goes on in a few thousand columns. Rows are finite.
    """
    num_stripes, beside = found.peaks.shape[1], found.beside
    if num_stripes < 4 * num:
        return logits.topk(num, dim=1).indices
    stripes = found.peaks.topk(num, dim=1, sorted=False).indices
    begin = stripes // beside * (_STRIPE * beside) + stripes % beside
    offsets = torch.arange(0, _STRIPE * beside, beside, device=logits.device)
    columns = (begin.unsqueeze(2) + offsets).flatten(1)
    rest = torch.arange(num_stripes * _STRIPE, logits.shape[1], device=logits.device).expand(len(logits), -1)
    columns = torch.cat([columns, rest], dim=1)
    return columns.gather(1, logits.gather(1, columns).topk(num, dim=1).indices)


def top_candidates(logits: Tensor, top_k: int, also: Sequence[tuple[int, ...]] = ()) -> Candidates:
    """The `top_k` likeliest ids of each row of `logits` (N, V), and those asked for by `also` (N entries or none).

    top_k >= V: whole distributions in the order of ids, tail -inf. An id of `also` that is not among the likeliest
    takes the place of the unlikeliest that nobody asked for. A row that is not finite comes back as NaN.
    """
    found = survey(logits)
    normaliser, (num_rows, vocabulary) = found.normaliser, logits.shape
    if top_k >= vocabulary:
        token_ids = torch.arange(vocabulary, device=logits.device).expand(num_rows, vocabulary)
        whole = logits.float() - normaliser.unsqueeze(1)
        return Candidates(token_ids, whole, torch.full_like(normaliser, -torch.inf))
    token_ids = likeliest(logits, top_k, found)
    for row, wanted in enumerate(also):
        if wanted:
            _force(token_ids[row], wanted)
    logprobs = logits.gather(1, token_ids).float() - normaliser.unsqueeze(1)
    return Candidates(token_ids, logprobs, log_rest(logprobs))


def likelihoods(logits: Tensor, following: Sequence[tuple[int, ...]]) -> tuple[float, ...]:
    """For each feed the sum of the log-probabilities of its `following` ids, without a search for the likeliest.

    logits: (N, V), a row for every id that is not -1, in the order of feeds and positions. Summed in float64.
    """
    asked = [[token_id for token_id in ids if token_id >= 0] for ids in following]
    columns = torch.tensor([token_id for ids in asked for token_id in ids], dtype=torch.long, device=logits.device)
    own = logits.gather(1, columns.unsqueeze(1)).squeeze(1).float() - survey(logits).normaliser  # (N,)
    parts = torch.split(own.double(), [len(ids) for ids in asked])
    return tuple(torch.stack([part.sum() for part in parts]).tolist())


def narrow(candidates: Candidates, num: int, keep: Sequence[tuple[int, ...]]) -> Candidates:
    """The `num` likeliest of each row as `Candidates.best`, and the ids of `keep` (N entries) as with `also`.

    Every id of `keep` must be among the row's candidates.
    """
    best = candidates.best(num)
    if best is candidates or not any(keep):
        return best
    token_ids, logprobs = best.token_ids.clone(), best.logprobs.clone()
    for row, wanted in enumerate(keep):
        if wanted:
            _force(token_ids[row], wanted)
            columns = _columns(candidates.token_ids[row], token_ids[row])
            logprobs[row] = candidates.logprobs[row, columns]
    return Candidates(token_ids, logprobs, log_rest(logprobs))


def _columns(have: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` (K,) stands in `have` (W,)."""
    if int(wanted.max()) < have.shape[0] and bool((have[wanted] == wanted).all()):
        return wanted  # a whole vocabulary in the order of ids
    return (wanted.unsqueeze(1) == have.unsqueeze(0)).int().argmax(dim=1)


def _force(token_ids: Tensor, wanted: tuple[int, ...]) -> None:
    """Put missing `wanted` ids into the last places of a row (K,), in place."""
    ids = token_ids.tolist()
    missing = [token_id for token_id in dict.fromkeys(wanted) if token_id not in ids]
    if missing:
        kept = [token_id for token_id in reversed(ids) if token_id not in wanted]
        dropped = set(kept[: len(missing)])
        row = [token_id for token_id in ids if token_id not in dropped] + missing
        assert len(row) == len(ids), "more ids are asked for than there are candidates"
        token_ids.copy_(torch.tensor(row))

"""Changes a request's fused distribution before sampling: penalties, biases, bans and constraints.

Order: repetition penalty, presence and frequency penalties, bias, then forbidden tokens: those that are not among the
allowed ids, that would complete a bad word, that the constraint does not allow, that would end the text too early.
Only tokens of the support can change; raised and allowed ids, and ids that a constraint allows, are requested from
main, so that they are in it. Nothing here raises: a row with numbers that are not finite keeps them. A row where
nothing is allowed becomes -inf everywhere, which the sampler reports. Rows do not affect one another. Does not know
members or fusion.

For a single model the repetition penalty divides the raw logits of tokens in the prompt or completion. A fused
distribution has only log-probabilities, which are at most 0. Dividing them would reward repetition, and multiplying
them hardly moves a nearly certain token. So a typical log-normaliser is added first, which brings log-probabilities
to the level of raw logits (`studies/repetition_penalty.py`).
"""

from __future__ import annotations

from collections import abc
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemble_core.decoding.counts import Flags, Ids
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused

TYPICAL_NORMALISER = 24.0  # the log-sum-exp of raw logits that the repetition penalty assumes, nats
_LEAST_LOGIT = 1.0  # lower logits move as if they were here
_FLOOR = -87.0  # about the log of the smallest normal float32


def shape(fused: Fused, sequences: abc.Sequence[Sequence], masks: abc.Sequence[Tensor | None]) -> Fused:
    """The same support with shaped log-probabilities, not normalised; `fused` itself if no row needs shaping.

    masks: for each row, (V,) bool, main's ids that its constraint allows; None: no constraint.
    """
    asked = [i for i, (s, mask) in enumerate(zip(sequences, masks, strict=True)) if _asks(s, mask)]
    if not asked:
        return fused
    index = torch.tensor(asked, device=fused.logprobs.device)
    ids = fused.token_ids[index].int().cpu().numpy()
    shaped = fused.logprobs.clone()
    shaped[index] = _shaped(ids, shaped[index], [sequences[i] for i in asked], [masks[i] for i in asked])
    return replace(fused, logprobs=shaped)


def penalise_repeats(logprobs: Tensor, penalty: Tensor) -> Tensor:
    """Log-probabilities after the repetition penalty. The penalty broadcasts.

    logprob - (1 - 1 / penalty) * max(logprob + C, 1), where C = `TYPICAL_NORMALISER`: the logit `logprob + C` is
    divided by the penalty, as transformers and vLLM divide positive logits. They multiply negative logits; here all
    logits below 1 move by the same amount, in the same direction as the others. Keeps the order of tokens, and -inf.
    A penalty of 1 changes nothing.
    """
    return logprobs - (1.0 - 1.0 / penalty) * (logprobs + TYPICAL_NORMALISER).clamp_min(_LEAST_LOGIT)


def _asks(sequence: Sequence, mask: Tensor | None) -> bool:
    return mask is not None or sequence.request.params.shapes_logits or _bans_stops(sequence)


def _forbids(sequence: Sequence, mask: Tensor | None) -> bool:
    """True if some ids are forbidden, so that others must be reachable, however unlikely."""
    return mask is not None or sequence.bans is not None or _bans_stops(sequence)


def _is_forced(sequence: Sequence) -> bool:
    """True where one token alone may come, which no ban can forbid."""
    return sequence.constraint is not None and sequence.constraint.forced is not None


def _bans_stops(sequence: Sequence) -> bool:
    """True before min_tokens, while tokens that would end the text are banned."""
    return sequence.num_completion_tokens < sequence.request.params.min_tokens


def _shaped(
    ids: Ids, logprobs: Tensor, sequences: abc.Sequence[Sequence], masks: abc.Sequence[Tensor | None]
) -> Tensor:
    """(n, S) fully shaped log-probabilities of `ids`."""
    bias, closed, banned = _biases(ids, sequences), _closed(ids, sequences, masks), _banned(ids, sequences)
    # min_tokens gives way where the constraint or the support leaves only tokens that end the text.
    forbidden = closed | banned
    forbidden = np.where(forbidden.all(axis=1, keepdims=True), closed, forbidden)
    is_bound = [_forbids(sequence, mask) for sequence, mask in zip(sequences, masks, strict=True)]
    wanted = (bias > 0) | (np.array(is_bound)[:, None] & ~forbidden)
    moved = _penalised(ids, _lifted(ids, logprobs, wanted), sequences)
    moved += torch.from_numpy(bias).to(moved.device)
    return moved.masked_fill(torch.from_numpy(forbidden).to(moved.device) & ~moved.isnan(), -torch.inf)


def _biases(ids: Ids, sequences: abc.Sequence[Sequence]) -> npt.NDArray[np.float32]:
    """(n, S): each row's biases."""
    bias = np.zeros(ids.shape, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if sequence.request.params.logit_bias:
            bias[row] = sequence.biases.of(ids[row])
    return bias


def _closed(ids: Ids, sequences: abc.Sequence[Sequence], masks: abc.Sequence[Tensor | None]) -> Flags:
    """(n, S): True for ids that a request does not allow, by its list of ids, its bad words or its constraint."""
    closed = np.zeros(ids.shape, dtype=np.bool_)
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        if mask is not None:
            closed[row] = ~mask.numpy()[ids[row]]
        if sequence.bans is not None and not _is_forced(sequence):
            closed[row] |= sequence.bans.of(ids[row], sequence.main.completion_ids)
    return closed


def _banned(ids: Ids, sequences: abc.Sequence[Sequence]) -> Flags:
    """(n, S): True for ids that would end a text before its min_tokens."""
    banned = np.zeros(ids.shape, dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        if _bans_stops(sequence):
            stops = sequence.main.vocabulary.stop_ids.union(sequence.request.params.stop_token_ids)
            banned[row] = np.isin(ids[row], list(stops))
    return banned


def _lifted(ids: Ids, logprobs: Tensor, wanted: Flags) -> Tensor:
    """Raise wanted ids from -inf to `_FLOOR`: fusion may round tiny probabilities to 0, which no bias could raise.

    An id that also occurs with a finite entry keeps its -inf entry, which is padding. Of an id with only -inf entries
    the first is raised.
    """
    if not bool(logprobs.isneginf().any()):
        return logprobs
    nothing = logprobs.isneginf().cpu().numpy()
    lifted = wanted & nothing
    for row in np.flatnonzero(lifted.any(axis=1)):
        places = np.flatnonzero(lifted[row])
        missing, first = np.unique(ids[row, places], return_index=True)
        lifted[row, places] = False
        lifted[row, places[first[~np.isin(missing, ids[row, ~nothing[row]])]]] = True
    return logprobs.masked_fill(torch.from_numpy(lifted).to(logprobs.device), _FLOOR)


def _penalised(ids: Ids, logprobs: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
    """(n, S) log-probabilities after the three penalties. Neutral penalties change no bit."""
    params = [sequence.request.params for sequence in sequences]
    seen, counts = np.zeros(ids.shape, dtype=np.bool_), np.zeros(ids.shape, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if params[row].penalises:
            seen[row], counts[row] = sequence.counts.of(ids[row])
    repeated = torch.from_numpy(seen).to(logprobs.device)
    generated = torch.from_numpy(counts).to(logprobs.device)
    repetition, presence, frequency = (
        torch.tensor([[getattr(p, name)] for p in params], dtype=logprobs.dtype, device=logprobs.device)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    moved = torch.where(repeated, penalise_repeats(logprobs, repetition), logprobs)
    return moved - (presence * (generated > 0) + frequency * generated)

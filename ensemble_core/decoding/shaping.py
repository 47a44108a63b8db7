"""What a request does to its fused distribution before a token is drawn: penalties, biases, bans, constraints.

Order: repetition penalty, presence and frequency penalties, bias, then what is forbidden. Only tokens of the support
can be changed; the engine asks for biased and allowed ones, so that they are in it. Nothing here raises: a row whose
numbers are not finite keeps them, and one whose constraint allows nothing becomes -inf throughout, which the sampler
reports. Rows do not see one another. Does not know members or fusion.

The repetition penalty of one model divides the raw logits of tokens that stand in the prompt or the completion. A
fused distribution has only log-probabilities, which are at most 0: dividing them would reward repetition, and
multiplying them hardly moves a token that is nearly certain. So a constant is added first, the log-normaliser that
models typically have, which brings them to the level of raw logits (`studies/repetition_penalty.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ensemble_core.decoding.counts import Flags, Ids
from ensemble_core.decoding.sequence import Sequence as Request
from ensemble_core.fusion.base import Fused

TYPICAL_NORMALISER = 24.0  # log of the sum of exp(logits) that the repetition penalty assumes, nats
_LEAST_LOGIT = 1.0  # what lies lower is moved as if it stood here
_FLOOR = -87.0  # about the log of the least float32 of full precision


def shape(fused: Fused, sequences: Sequence[Request], masks: Sequence[Tensor | None]) -> Fused:
    """The same support with shaped log-probabilities, not normalised; `fused` itself where nobody asks for anything.

    masks: for each row, which of main's ids its constraint allows (V,) bool, or None.
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
    """What log-probabilities become where the token is repeated; the penalty broadcasts.

    logprob - (1 - 1 / penalty) * max(logprob + C, 1), where C = `TYPICAL_NORMALISER`: the logit `logprob + C` is
    divided by the penalty, as transformers and vLLM divide positive logits. They multiply negative ones; here tokens
    that unlikely all move by the same, in the direction of the others. Keeps the order of tokens, and -inf; a penalty
    of 1 changes nothing.
    """
    return logprobs - (1.0 - 1.0 / penalty) * (logprobs + TYPICAL_NORMALISER).clamp_min(_LEAST_LOGIT)


def _asks(sequence: Request, mask: Tensor | None) -> bool:
    return mask is not None or sequence.request.params.shapes_logits or _bans_stops(sequence)


def _bans_stops(sequence: Request) -> bool:
    """True before min_tokens: whatever would end the text may not come next."""
    return sequence.num_completion_tokens < sequence.request.params.min_tokens


def _shaped(ids: Ids, logprobs: Tensor, sequences: Sequence[Request], masks: Sequence[Tensor | None]) -> Tensor:
    """(n, S) log-probabilities of `ids` after everything."""
    bias, closed, banned = _biases(ids, sequences), _closed(ids, masks), _banned(ids, sequences)
    # A constraint that leaves nothing but the end is stronger than min_tokens, and so is a support of nothing else.
    forbidden = closed | banned
    forbidden = np.where(forbidden.all(axis=1, keepdims=True), closed, forbidden)
    is_bound = [mask is not None or _bans_stops(sequence) for mask, sequence in zip(masks, sequences, strict=True)]
    wanted = (bias > 0) | (np.array(is_bound)[:, None] & ~forbidden)
    moved = _penalised(ids, _lifted(ids, logprobs, wanted), sequences)
    moved += torch.from_numpy(bias).to(moved.device)
    return moved.masked_fill(torch.from_numpy(forbidden).to(moved.device) & ~moved.isnan(), -torch.inf)


def _biases(ids: Ids, sequences: Sequence[Request]) -> npt.NDArray[np.float32]:
    """(n, S): what requests add to single ids."""
    bias = np.zeros(ids.shape, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        if sequence.request.params.logit_bias:
            bias[row] = sequence.biases.of(ids[row])
    return bias


def _closed(ids: Ids, masks: Sequence[Tensor | None]) -> Flags:
    """(n, S): what constraints do not allow."""
    closed = np.zeros(ids.shape, dtype=np.bool_)
    for row, mask in enumerate(masks):
        if mask is not None:
            closed[row] = ~mask.numpy()[ids[row]]
    return closed


def _banned(ids: Ids, sequences: Sequence[Request]) -> Flags:
    """(n, S): what would end a text before its min_tokens."""
    banned = np.zeros(ids.shape, dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        if _bans_stops(sequence):
            stops = sequence.main.vocabulary.stop_ids.union(sequence.request.params.stop_token_ids)
            banned[row] = np.isin(ids[row], list(stops))
    return banned


def _lifted(ids: Ids, logprobs: Tensor, wanted: Flags) -> Tensor:
    """Fusion may round what is all but impossible down to nothing, which no bias could lift again.

    Of an id that stands twice the padding stays as it is, and so does all but one entry of an id that has none.
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


def _penalised(ids: Ids, logprobs: Tensor, sequences: Sequence[Request]) -> Tensor:
    """(n, S) after the three penalties; neutral ones change no bit."""
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

"""What a request does to its fused distribution before a token is drawn: penalties, biases, bans, constraints.

Order: repetition penalty, presence and frequency penalties, bias, then what is forbidden. Numbers are fused
log-probabilities, so the repetition penalty, which vLLM applies to raw logits, always makes a repeated token less
likely (for a penalty above 1). Only tokens of the support can be changed; the engine asks for biased and allowed
ones, so that they are in it. Does not know members or fusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import replace

import torch
from torch import Tensor

from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused

_FLOOR = -87.0  # about the log of the least float32 of full precision


def shape(fused: Fused, sequences: Rows[Sequence], masks: Rows[Tensor | None]) -> Fused:
    """The same support with shaped log-probabilities, not normalised; `fused` itself where nobody asks for anything.

    masks: for each row, which of main's ids its constraint allows (V,) bool, or None.
    """
    asked = [i for i, (s, mask) in enumerate(zip(sequences, masks, strict=True)) if _asks(s, mask)]
    if not asked:
        return fused
    shaped = fused.logprobs.clone()
    for row in asked:
        shaped[row] = _shaped(fused.token_ids[row], shaped[row], sequences[row], masks[row])
    return replace(fused, logprobs=shaped)


def _asks(sequence: Sequence, mask: Tensor | None) -> bool:
    return mask is not None or sequence.request.params.shapes_logits or bool(_banned(sequence))


def _shaped(token_ids: Tensor, logprobs: Tensor, sequence: Sequence, mask: Tensor | None) -> Tensor:
    """One row (S,) after everything."""
    closed = None if mask is None else ~mask.to(token_ids.device)[token_ids]
    wanted = torch.isin(token_ids, _column(sequence.biased, token_ids))
    if closed is not None:
        wanted |= ~closed
    # Fusion may round what is all but impossible down to nothing, which no bias could lift again.
    logprobs = torch.where(wanted & logprobs.isneginf(), _FLOOR, logprobs)
    if sequence.request.params.shapes_logits:
        logprobs = _penalised(token_ids, logprobs, sequence)
    return logprobs.masked_fill(_forbidden(token_ids, sequence, closed), -torch.inf)


def _forbidden(token_ids: Tensor, sequence: Sequence, closed: Tensor | None) -> Tensor:
    """(S,) bool; a constraint that leaves nothing but the end is stronger than min_tokens."""
    banned = torch.isin(token_ids, _column(_banned(sequence), token_ids))
    if closed is None:
        return banned
    return closed if bool((banned | closed).all()) else banned | closed


def _penalised(token_ids: Tensor, logprobs: Tensor, sequence: Sequence) -> Tensor:
    """One row (S,) after penalties and bias."""
    params = sequence.request.params
    ids = token_ids.tolist()
    generated = Counter(sequence.main.completion_ids)
    seen = generated.keys() | set(sequence.main.prompt_ids)
    bias = dict(params.logit_bias)

    repetition = _column([params.repetition_penalty if i in seen else 1.0 for i in ids], logprobs)
    counts = _column([float(generated[i]) for i in ids], logprobs)
    penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    return logprobs * repetition - penalty + _column([bias.get(i, 0.0) for i in ids], logprobs)


def _column(values: Rows[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _banned(sequence: Sequence) -> list[int]:
    """Ids that may not come next: whatever would end the text before min_tokens."""
    params = sequence.request.params
    if sequence.num_completion_tokens >= params.min_tokens:
        return []
    return sorted(sequence.main.vocabulary.stop_ids.union(params.stop_token_ids))

"""What a request does to its fused distribution before a token is drawn: penalties, biases, bans, constraints.

Order: repetition penalty, presence and frequency penalties, bias, then what is forbidden. Numbers are fused
log-probabilities, so the repetition penalty, which vLLM applies to raw logits, always makes a repeated token less
likely (for a penalty above 1). Only tokens of the support can be changed; admission makes sure that biased ones are
in it. Does not know members or fusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from ensemble_core.decoding.guidance import allowed_rows
from ensemble_core.decoding.sequence import Sequence


def shape(token_ids: Tensor, logprobs: Tensor, sequences: Rows[Sequence], masks: Rows[Tensor | None]) -> Tensor:
    """Shaped log-probabilities (B, S), not normalised; the input itself where nobody asks for anything.

    masks: for each row, which of main's ids its constraint allows (V,) bool, or None.
    """
    shaped = logprobs
    for row, sequence in enumerate(sequences):
        if sequence.request.params.shapes_logits:
            shaped = shaped.clone() if shaped is logprobs else shaped
            shaped[row] = _penalised(token_ids[row], logprobs[row], sequence)
        if banned := _banned(sequence):
            forbidden = torch.isin(token_ids[row], torch.tensor(banned, device=token_ids.device))
            shaped = shaped.clone() if shaped is logprobs else shaped
            shaped[row, forbidden] = -torch.inf
    if any(mask is not None for mask in masks):
        shaped = shaped.masked_fill(~allowed_rows(token_ids, masks), -torch.inf)
    return shaped


def _penalised(token_ids: Tensor, logprobs: Tensor, sequence: Sequence) -> Tensor:
    """One row (S,) after penalties and bias."""
    params = sequence.request.params
    ids = token_ids.tolist()
    generated = Counter(sequence.main.completion_ids)
    seen = generated.keys() | set(sequence.main.prompt_ids)
    bias = dict(params.logit_bias)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logprobs.dtype, device=logprobs.device)

    repetition = column([params.repetition_penalty if i in seen else 1.0 for i in ids])
    counts = column([float(generated[i]) for i in ids])
    penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    return logprobs * repetition - penalty + column([bias.get(i, 0.0) for i in ids])


def _banned(sequence: Sequence) -> list[int]:
    """Ids that may not come next: whatever would end the text before min_tokens."""
    params = sequence.request.params
    if sequence.num_completion_tokens >= params.min_tokens:
        return []
    return sorted(sequence.main.vocabulary.stop_ids.union(params.stop_token_ids))

"""What a request does to its fused distribution before a token is drawn: penalties, biases, bans, constraints.

Order: repetition penalty, presence and frequency penalties, bias, then what is forbidden. Numbers are fused
log-probabilities, so the repetition penalty, which vLLM applies to raw logits, always makes a repeated token less
likely (for a penalty above 1). Only tokens of the support can be changed; admission makes sure that biased ones are
in it. Does not know members or fusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import replace

import torch
from torch import Tensor

from ensemble_core.decoding.sequence import Sequence
from ensemble_core.fusion.base import Fused


def shape(fused: Fused, sequences: Rows[Sequence], masks: Rows[Tensor | None]) -> Fused:
    """The same support with shaped log-probabilities, not normalised; `fused` itself where nobody asks for anything.

    masks: for each row, which of main's ids its constraint allows (V,) bool, or None.
    """
    asked = [i for i, s in enumerate(sequences) if s.request.params.shapes_logits or _banned(s)]
    if not asked and all(mask is None for mask in masks):
        return fused
    token_ids, shaped = fused.token_ids, fused.logprobs.clone()
    for row in asked:
        sequence = sequences[row]
        if sequence.request.params.shapes_logits:
            shaped[row] = _penalised(token_ids[row], shaped[row], sequence)
        banned = torch.tensor(_banned(sequence), dtype=torch.long, device=token_ids.device)
        shaped[row, torch.isin(token_ids[row], banned)] = -torch.inf
    for row, mask in enumerate(masks):
        if mask is not None:
            shaped[row, ~mask.to(token_ids.device)[token_ids[row]]] = -torch.inf
    return replace(fused, logprobs=shaped)


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

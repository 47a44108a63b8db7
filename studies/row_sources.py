"""What a token's row in relative space can be made of, beside input embeddings: output embeddings, and contexts.

Each source is a table (V, d), from which `transfer.rows` makes a matrix as it does from embeddings. A context is the
final hidden state before a place: its mean over all places where the text goes on with the token's bytes, whether or
not the model itself writes that token there. So an anchor that a model hardly ever writes has contexts, too.
Knows checkpoints and texts; does not know fusions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensemble_core.text.vocabulary import Vocabulary
from ensemble_core.transfer.embeddings import load_embeddings

_WINDOW = 256  # tokens that are read at once


def output_embeddings(folder: Path) -> Tensor:
    """Rows of the head (V, d); the input embeddings where both are one."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        if "lm_head.weight" in file.keys():  # noqa: SIM118 - not a mapping
            table: Tensor = file.get_tensor("lm_head.weight")
            return table
    return load_embeddings(folder)


def contexts(folder: Path, vocabulary: Vocabulary, texts: Sequence[str]) -> Tensor:
    """Mean hidden states before each token's bytes, (V, d); the mean over all places for a token that never comes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    width = model.config.hidden_size
    sums, counts = torch.zeros(len(vocabulary), width), torch.zeros(len(vocabulary), 1)
    for text in texts:
        ids = vocabulary.encode(text)
        for start in range(0, len(ids) - 1, _WINDOW):
            piece = ids[start : start + _WINDOW + 1]
            states = _states(model, piece[:-1])
            rows, tokens = _continuations(vocabulary, piece)
            sums.index_add_(0, tokens, states[rows])
            counts.index_add_(0, tokens, torch.ones(len(rows), 1))
    mean = sums.sum(dim=0) / counts.sum()
    return torch.where(counts > 0, sums / counts.clamp_min(1.0), mean)


def _states(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """The final hidden state after each token, (T, d)."""
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    states: Tensor = found.hidden_states[-1][0]
    return states


def _continuations(vocabulary: Vocabulary, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions of all but the last token, and every token with whose bytes the text goes on there."""
    spelt = [vocabulary.text_bytes(token_id) for token_id in ids]
    pairs = [
        (row, token)
        for row in range(len(ids) - 1)
        for token in _beginnings(vocabulary, b"".join(spelt[row + 1 : row + 1 + _LOOK_AHEAD]))
    ]
    rows, tokens = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(rows, dtype=torch.long), torch.tensor(tokens, dtype=torch.long)


def _beginnings(vocabulary: Vocabulary, text: bytes) -> Iterator[int]:
    known = vocabulary.ids_by_bytes
    for end in range(1, min(len(text), _LOOK_AHEAD) + 1):
        if text[:end] in known:
            yield known[text[:end]]


_LOOK_AHEAD = 16  # bytes; few tokens are longer

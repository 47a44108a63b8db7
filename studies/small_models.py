"""Small language models trained on the spot: a byte-level tokenizer and a transformer, saved as a checkpoint.

What lies in the folder is what a model from elsewhere has: safetensors, config, tokenizer. The same seed gives the
same model on the same machine. Knows texts; does not know what they are about, nor ensembles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen3"]
Kind = Literal["bpe", "unigram"]

END = "<|endoftext|>"
MAX_LEN = 1024
_HEADS, _HEAD_SIZE = 4, 32
_WARM_UP = 0.1  # of all steps


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is and how long it learns. window: tokens; batch: windows a step; rate: the peak.

    A BPE vocabulary of 257 has the bytes and the end of text alone.
    """

    vocabulary: int
    hidden: int
    layers: int
    steps: int
    window: int = 64
    batch: int = 16
    rate: float = 1e-2
    tokenizer: Kind = "bpe"


def train(family: Family, texts: Sequence[str], folder: Path, size: Size, seed: int) -> float:
    """Train a model and its tokenizer on `texts` and save both; returns the last tenth's mean loss, nats a token."""
    tokenizer = train_tokenizer(texts, size.vocabulary, size.tokenizer)
    ids = torch.tensor([token_id for text in texts for token_id in [0, *tokenizer(text)["input_ids"]]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FAMILIES[family](size)
    loss = _fit(model, ids, size, seed, folder.name)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def train_tokenizer(texts: Sequence[str], size: int, kind: Kind = "bpe") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `size` ids; the end of text is id 0."""
    model, trainer = _KINDS[kind]
    backend = Tokenizer(model())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    plan = trainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, plan)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def _fit(model: Any, ids: Tensor, size: Size, seed: int, label: str) -> float:
    """AdamW on random windows of ids (T,); returns the mean loss of the last tenth."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share_of_rate(step, size.steps))
    losses: list[float] = []
    for _ in tqdm(range(size.steps), desc=f"training {label}", unit="step", disable=None):
        starts = torch.randint(len(ids) - size.window, (size.batch, 1), generator=draw)
        windows = ids[starts + torch.arange(size.window)]  # (B, N)
        loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    last = losses[-max(size.steps // 10, 1) :]
    return sum(last) / len(last)


def _share_of_rate(step: int, steps: int) -> float:
    """A linear warm-up under a cosine that ends at zero."""
    return min((step + 1) / (_WARM_UP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def _llama(size: Size) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_shape(size), tie_word_embeddings=False))


def _qwen3(size: Size) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_shape(size), tie_word_embeddings=True))


def _shape(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 3 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "head_dim": _HEAD_SIZE,
        "max_position_embeddings": MAX_LEN,
        "eos_token_id": 0,
        "bos_token_id": None,
    }


_FAMILIES: dict[Family, Callable[[Size], Any]] = {"llama": _llama, "qwen3": _qwen3}
_KINDS: dict[Kind, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "bpe": (models.BPE, trainers.BpeTrainer),
    "unigram": (models.Unigram, trainers.UnigramTrainer),
}

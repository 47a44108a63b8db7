"""Tiny seeded random models with tokenizers trained on the spot: CPU, fp32, a second each.

Their vocabularies differ in kind and size: Llama and Gemma 3 have SentencePiece-like BPE with byte fallback
(Metaspace, and a plain Replace as Gemma's own), Qwen 3 and GPT-2 have byte-level BPE. Weights are wide enough
that greedy texts vary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Kind = Literal["llama", "gemma3", "qwen3", "gpt2"]
KINDS: tuple[Kind, ...] = ("llama", "gemma3", "qwen3", "gpt2")
VOCAB_SIZES: dict[Kind, int] = {"llama": 480, "gemma3": 640, "qwen3": 560, "gpt2": 400}
MAX_POSITIONS = 512
STD = 0.3  # of the random weights

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "In a village by the sea there lived a fisherman who had three daughters and a boat.",
    "def add(left, right):\n\treturn left + right\n\n\nprint(add(1, 22))\n",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000; the answer is 42.",
    "Größe, déjà vu, naïve; Привет мир, как дела; καλημέρα κόσμε.",
    "你好，世界。今天天气很好。東京は日本の首都です。",
    "She said that the other one was there when they went to the house of the mother.",
    "emoji 😀😀 and 🏳️‍🌈 too; two  spaces and   three.",
]
# Made-up words, so that large vocabularies find enough to merge.
CORPUS += [" ".join(map("".join, product(["ba", "ke", "mi", "to", "du", "sha", "len"], repeat=3)))]
_ASCII = [chr(code) for code in range(0x20, 0x7F)]


def tiny_checkpoint(kind: Kind, folder: Path, seed: int = 0, vocab_size: int | None = None) -> Path:
    """Save a tiny random model of `kind`, with its tokenizer, as a safetensors folder; returns `folder`.

    vocab_size: rows of the embedding table, at least 300. The tokenizer has three ids fewer, as many real
    checkpoints pad their table.
    """
    size = vocab_size if vocab_size is not None else VOCAB_SIZES[kind]
    tokenizer = _TOKENIZERS[kind](size - 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[kind](size)
    _silence(model, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _silence(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make ids without text unlikely, as training does: the padding of the table, and control tokens but eos."""
    head = model.get_output_embeddings().weight
    head[len(tokenizer) :] *= 0.01
    specials = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in specials - {tokenizer.eos_token_id}:
        head[token_id] *= 0.01


def byte_level(size: int, eos: str, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 and Qwen have it: no byte is ever unknown."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[eos, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, size, eos_token=eos)


def metaspace(size: int, prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback; spaces through Metaspace, as newer Llama conversions."""
    backend = _byte_fallback_bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend_scheme), decoders.Fuse()]
    )
    return _sentencepiece(backend, size, bos="<s>", eos="</s>")


def replacing(size: int, prepend: bool = False, across: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE with byte fallback; spaces through a Replace, as Gemma; `prepend` as Llama 2.

    across: tokens may run over spaces, as Gemma's do.
    """
    backend = _byte_fallback_bpe()
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else normalizers.Sequence([replace])
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    # Without a pre-tokenizer, or a bound, whole lines would become tokens of a corpus as small as this.
    split = (" ", "merged_with_previous") if across else ("▁", "merged_with_next")
    backend.pre_tokenizer = pre_tokenizers.Split(*split)
    return _sentencepiece(backend, size, bos="<bos>", eos="<eos>", longest=8 if across else None)


def _byte_fallback_bpe() -> Tokenizer:
    return Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def _sentencepiece(
    backend: Tokenizer, size: int, bos: str, eos: str, longest: int | None = None
) -> PreTrainedTokenizerFast:
    specials = ["<unk>", bos, eos]
    bytes_ = [AddedToken(f"<0x{byte:02X}>", special=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*specials, *bytes_],
        initial_alphabet=["▁", *_ASCII],
        limit_alphabet=len(_ASCII) + 1,
        show_progress=False,
        max_token_length=longest,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(_only_specials_added(backend, specials), size, bos_token=bos, eos_token=eos, unk_token="<unk>")


def _only_specials_added(backend: Tokenizer, specials: list[str]) -> Tokenizer:
    """The trainer makes every reserved token an added one; the 256 bytes are to be ordinary."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(spec))


def _wrapped(backend: Tokenizer, size: int, **names: str) -> PreTrainedTokenizerFast:
    assert backend.get_vocab_size() == size, f"the corpus gives {backend.get_vocab_size()} tokens, not {size}"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _llama(size: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(**_shape(size), num_attention_heads=4, num_key_value_heads=2, eos_token_id=2, bos_token_id=1)
    )


def _gemma3(size: int) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_shape(size),
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            # Tied, the scaled embeddings of a random model make it repeat its last token for ever.
            tie_word_embeddings=False,
            eos_token_id=2,
            bos_token_id=1,
        )
    )


def _qwen3(size: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            **_shape(size),
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=None,
        )
    )


def _gpt2(size: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size,
            n_positions=MAX_POSITIONS,
            n_embd=64,
            n_layer=3,
            n_head=4,
            initializer_range=STD,
            eos_token_id=0,
            bos_token_id=0,
        )
    )


def _shape(size: int) -> dict[str, Any]:
    return {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": STD,
    }


_TOKENIZERS: dict[Kind, Callable[[int], PreTrainedTokenizerFast]] = {
    "llama": metaspace,
    "gemma3": replacing,
    "qwen3": lambda size: byte_level(size, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")),
    "gpt2": lambda size: byte_level(size, "<|endoftext|>"),
}
_MODELS: dict[Kind, Callable[[int], Any]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
}

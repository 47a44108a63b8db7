"""Tokenizers of every kind that splits or spells in its own way, trained on the spot, for tests of respelling."""

from __future__ import annotations

import random
from itertools import pairwise

from tiny_models import CORPUS, byte_level, metaspace, replacing
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer

SIZE = 480
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*{_CONTRACTED}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace(_CONTRACTED, "").replace("{1,3}", "")
PATTERNS = {"qwen": QWEN, "qwen-marks": QWEN_MARKS, "llama": LLAMA, "gpt4o": GPT4O, "tekken": TEKKEN}

_TEXTS = [
    *CORPUS,
    "中文 文字 你好 世界 今天 天气 很好 你好你好 世界世界",
    '{"name":"fox","tags":["a","bb"],"n":1000}',
    "aaaa aaaaaaaa ==== ======== haha hahaha abababab 你好你好你好",
]
# One character ends in the byte that ends all others, so tokens that run from within one into the next pay.
ALIKE = [chr(0x5107 + 64 * rank) for rank in range(40)]


def across_spaces(size: int = SIZE, *, nfc: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a pattern: tokens run over spaces and end within characters, as SuperBPE's do."""
    backend = Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(backend, size, [*_TEXTS, " ".join(ALIKE)])


def patterned(pattern: str, *, ignore_merges: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE behind a Split, as Qwen, Llama 3 and GPT-4o."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _byte_level(backend, SIZE)


def digits_apart() -> PreTrainedTokenizerFast:
    """Byte-level BPE with each digit alone, as SmolLM2 was trained."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return _byte_level(backend, SIZE)


def _byte_level(backend: Tokenizer, size: int, texts: list[str] = _TEXTS) -> PreTrainedTokenizerFast:
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=9,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def with_lines(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With runs of newlines as added tokens, as Gemma."""
    tokenizer.add_tokens([AddedToken("\n" * length, normalized=False) for length in range(1, 9)])
    return tokenizer


def with_names(tokenizer: PreTrainedTokenizerFast, *, normalized: bool = False) -> PreTrainedTokenizerFast:
    """With added tokens that overlap each other and control tokens."""
    names = [
        *("\n" * length for length in (1, 2, 3, 5)),
        "<td>",
        "<tr><td>",
        "a<t",
        "> x",
        "<eos",
        "<|x\n|",
        "你好\n",
    ]
    tokenizer.add_tokens([AddedToken(name, normalized=normalized) for name in names])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x\n|>", "<tr><"]})
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(0x20, 0x7F)],
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """WordPiece whose continued pieces have no mark, behind a Metaspace."""
    pieces = dict.fromkeys(
        [*map(chr, range(0x21, 0x7F)), "▁", *"你好世界中文\n\t", "the", "▁the", "fox", "ing", "qu"]
    )
    pieces |= dict.fromkeys([char for text in _TEXTS for char in text if char != " "])
    ids = {piece: rank for rank, piece in enumerate(["<unk>", "</s>", *pieces])}
    model = models.WordPiece(ids, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=12)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def random_merges(seed: int, use_regex: bool = False) -> Vocabulary:
    """Byte-level BPE with merges that nobody would train, in an order that nobody would learn."""
    rng = random.Random(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = list(rng.choice(["ab", "abĠ", "aäå", "abcĠĊ", "ä½łå¥"]))
    merges: dict[tuple[str, str], None] = {}
    for _ in range(rng.randint(3, 40)):
        pair = rng.choice(symbols), rng.choice(symbols)
        if len(pair[0] + pair[1]) <= rng.choice([2, 3, 4, 8]):
            merges[pair] = None
            symbols.append(pair[0] + pair[1])
    order = list(merges)
    rng.shuffle(order)
    return _merging([*alphabet, *symbols], order, use_regex)


def chained(letters: str) -> Vocabulary:
    """BPE that merges neighbours in the alphabet, the last first: each letter more moves all tokens before it."""
    order = [(left, right) for left, right in pairwise(letters)][::-1]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _merging([*alphabet, *map("".join, order)], order, use_regex=False)


def _merging(symbols: list[str], order: list[tuple[str, str]], use_regex: bool) -> Vocabulary:
    names = dict.fromkeys([*symbols, "<eos>"])
    backend = Tokenizer(models.BPE({name: rank for rank, name in enumerate(names)}, order))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return from_tokenizer(tokenizer, len(names), [tokenizer.eos_token_id], "merging")


def every_kind() -> dict[str, Vocabulary]:
    """A vocabulary of each kind, by name."""
    tokenizers = {
        "byte-level": byte_level(SIZE, "<eos>"),
        "metaspace": metaspace(SIZE),
        "replace": replacing(SIZE),
        "replace-prepend": replacing(SIZE, prepend=True),
        "across-spaces": across_spaces(),
        "across-spaces-names": with_names(across_spaces()),
        "across-spaces-nfc": across_spaces(nfc=True),
        "unpatterned": replacing(SIZE, across=True),
        "unpatterned-lines": with_lines(replacing(SIZE, across=True)),
        "unpatterned-names": with_names(replacing(SIZE, across=True)),
        "normalized-names": with_names(replacing(SIZE, across=True), normalized=True),
        "digits-apart": digits_apart(),
        "unigram": unigram(),
        "word-piece": word_piece(),
        "names": with_names(byte_level(SIZE, "<eos>")),
        "qwen-nfc": patterned(QWEN, nfc=True),
        "llama-whole": patterned(LLAMA, ignore_merges=True),
        "unknown-pattern": patterned(r"\S+ ?\S*|\s+"),
    }
    tokenizers |= {name: patterned(pattern) for name, pattern in PATTERNS.items()}
    return {
        name: from_tokenizer(tokenizer, len(tokenizer), [tokenizer.eos_token_id], name)
        for name, tokenizer in tokenizers.items()
    }


UNCOVERED = {"unknown-pattern"}

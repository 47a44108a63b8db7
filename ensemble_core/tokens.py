"""Prompts in the tokens of a model's main member, and back; told without the engine.

Knows admission; does not know engines, members or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ensemble_core.admission import Admission
from ensemble_core.decoding.requests import Prompt


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt as tokens: ids, how the vocabulary writes them, and the context length that they must fit."""

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    max_model_len: int

    @property
    def room(self) -> int:
        """Tokens that the context has left."""
        return self.max_model_len - len(self.token_ids)


async def tokenized(
    admission: Admission, model: str, prompt: Prompt, add_special_tokens: bool = True
) -> Tokenized:
    """A prompt in the tokens of a model's main member. Raises ModelNotFoundError, InvalidRequestError."""
    ids, main = await asyncio.to_thread(admission.tokenize, model, prompt, add_special_tokens)
    return Tokenized(tuple(ids), tuple(main.prompts.pieces(ids)), main.max_len)


async def tightest_of(admission: Admission, models: Iterable[str], prompt: Prompt) -> Tokenized:
    """A prompt in the tokens of the model with least room for it. Raises as `tokenized`."""
    found = [await tokenized(admission, name, prompt) for name in sorted(models)]
    return min(found, key=lambda each: each.room)


async def detokenized(admission: Admission, model: str, token_ids: Sequence[int]) -> str:
    """The text of the main member's ids, with control tokens by name. Raises as `tokenized`."""
    return await asyncio.to_thread(admission.spell, model, token_ids)


def tokenizer_facts(admission: Admission, model: str) -> dict[str, Any]:
    """Facts about the tokenizer of a model's main member. Raises ModelNotFoundError."""
    name, main = admission.main_of(model)
    return {
        "member": name,
        "vocab_size": len(main.vocabulary),
        "stop_token_ids": sorted(main.vocabulary.stop_ids),
        "max_model_len": main.max_len,
        "fingerprint": main.vocabulary.fingerprint,
        **main.prompts.describe(),
    }

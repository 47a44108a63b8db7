"""Random schemas and patterns over tiny vocabularies with random choices: each text that ends is as asked."""

from __future__ import annotations

import json
import random
import re

import pytest
from fakes import byte_vocabulary
from jsonschema import Draft202012Validator
from random_forms import pattern, schema
from tiny_models import byte_level

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.text.vocabulary import from_tokenizer

VOCABULARIES = (
    byte_vocabulary(),
    from_tokenizer(byte_level(397, "<eos>", ("<|im_end|>",)), 400, [0], "m"),
)
LIMIT = 400


def decode(form: TextForm, seed: int) -> str | None:
    """A text by random logits, which like what ends values; None where it has not ended at the limit."""
    rng, vocabulary = random.Random(seed), VOCABULARIES[seed % len(VOCABULARIES)]
    constraint, text = Grammars(vocabulary).compile(form), b""
    for _ in range(LIMIT):
        choices = constraint.allowed().nonzero().flatten().tolist()
        closing = [
            i for i in choices if i in vocabulary.stop_ids or vocabulary.tokens[i] in (b'"', b"}", b"]", b"n")
        ]
        chosen = rng.choice(closing if closing and rng.random() < 0.5 else choices)
        if chosen in vocabulary.stop_ids:
            return text.decode()
        constraint.accept(chosen)
        text += vocabulary.tokens[chosen]
    return None


@pytest.mark.parametrize("seed", range(40))
def test_every_text_that_ends_follows_its_random_schema(seed: int) -> None:
    asked = schema(seed)
    for walk in range(3):
        if (text := decode(TextForm("json", json.dumps(asked)), seed + walk)) is not None:
            Draft202012Validator(asked).validate(json.loads(text))


@pytest.mark.parametrize("seed", range(50))
def test_every_text_that_ends_matches_its_random_pattern(seed: int) -> None:
    asked = pattern(seed)
    for walk in range(3):
        if (text := decode(TextForm("regex", asked), seed + walk)) is not None:
            assert re.fullmatch(asked, text), asked


def test_most_texts_end() -> None:
    """Else the tests above would hold of nothing."""
    ended = [decode(TextForm("json", json.dumps(schema(seed))), seed) is not None for seed in range(40)]
    assert sum(ended) >= 30

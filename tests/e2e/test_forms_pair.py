"""Random schemas and patterns on the demo pair: each text that ends is as asked, streamed and not.

40 schemas, and with UNISONO_THOROUGH=1 (`make test-thorough`) 200; 50 patterns.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Iterator

import pytest
from jsonschema import Draft202012Validator
from random_forms import pattern, schema

from ensemble_core.config import Config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM

pytestmark = pytest.mark.slow

SCHEMAS = [schema(seed) for seed in range(200 if os.environ.get("UNISONO_THOROUGH") else 40)]
PATTERNS = [pattern(seed) for seed in range(50)]
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def llm(demo_config: Config) -> Iterator[LLM]:
    engine = LLM(demo_config)
    yield engine
    engine.close()
    del engine
    gc.collect()


def params(form: TextForm, seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=seed, form=form)


def of_schemas() -> list[SamplingParams]:
    return [params(TextForm("json", json.dumps(each)), seed) for seed, each in enumerate(SCHEMAS)]


def test_texts_of_random_schemas(llm: LLM) -> None:
    answers = llm.generate(["JSON: "] * len(SCHEMAS), of_schemas())
    assert {each.finish_reason for each in answers} <= {"stop", "length"}
    ended = [(asked, each) for asked, each in zip(SCHEMAS, answers, strict=True) if each.finish_reason == "stop"]
    assert len(ended) > 0.6 * len(SCHEMAS), "at temperature 1 some write long texts, but most end"
    for asked, answer in ended:
        Draft202012Validator(asked).validate(json.loads(answer.text))


@pytest.mark.parametrize("first", range(0, len(SCHEMAS), 20))
def test_streamed_texts_of_random_schemas(llm: LLM, first: int) -> None:
    """Several streams are open at once and read in turn."""
    places = range(first, first + 20)
    streams = {
        i: llm.stream("JSON: ", asked) for i, asked in zip(places, of_schemas()[first : first + 20], strict=True)
    }
    texts = dict.fromkeys(places, "")
    for _ in range(NUM_TOKENS + 1):
        for i in list(streams):
            piece = next(streams[i], None)
            if piece is None:
                del streams[i]
            else:
                texts[i] += piece
    for i in places:
        try:
            value = json.loads(texts[i])
        except ValueError:
            continue  # cut at its length
        Draft202012Validator(SCHEMAS[i]).validate(value)


def test_texts_of_random_patterns(llm: LLM) -> None:
    asked = [params(TextForm("regex", each), seed) for seed, each in enumerate(PATTERNS)]
    answers = llm.generate(["Text: "] * len(PATTERNS), asked)
    ended = [
        (each, answer.text)
        for each, answer in zip(PATTERNS, answers, strict=True)
        if answer.finish_reason == "stop"
    ]
    assert len(ended) > 0.6 * len(PATTERNS)
    for each, text in ended:
        assert re.fullmatch(each, text), each

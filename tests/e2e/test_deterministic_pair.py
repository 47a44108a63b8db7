"""`deterministic: true` with the demo pair in bf16: every bit of an answer is the same alone and in a crowd."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ensemble_core.config import Config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM

HEAD = (
    "Once upon a time, in a small village by the sea, there lived a fisherman who had three daughters and a boat. "
)
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=5)
SEEDED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=7)
ASKED = [
    ("The capital of France is", GREEDY),
    (HEAD * 12 + "One day", replace(GREEDY, max_tokens=6)),
    (HEAD * 12 + "In the end", SEEDED),
    ("中国的首都是", replace(SEEDED, seed=-7)),
    ("def fibonacci(n):\n    ", replace(GREEDY, logit_bias=tuple((i, 2.0) for i in range(300, 400)))),
    ("Water boils at a temperature of", replace(GREEDY, form=TextForm("json", SCHEMA))),
    ("😀 means", replace(SEEDED, repetition_penalty=1.2, frequency_penalty=0.3)),
    (HEAD, replace(GREEDY, echo=True, max_tokens=2)),
]


@pytest.fixture(scope="module")
def llm(demo_config: Config) -> Iterator[LLM]:
    members = {
        name: member.model_copy(update={"kv_memory": 512 * 2**20, "max_len": 1024})
        for name, member in demo_config.members.items()
    }
    engine = LLM(demo_config.model_copy(update={"members": members, "deterministic": True}))
    yield engine
    engine.close()
    del engine
    gc.collect()


@pytest.mark.parametrize("model", ["duet", "duet-smollm2"])
def test_an_answer_is_the_same_alone_and_in_a_crowd(llm: LLM, model: str) -> None:
    prompts, params = [prompt for prompt, _ in ASKED], [params for _, params in ASKED]
    together = llm.generate(prompts, params, model=model)
    alone = [llm.generate(prompt, own, model=model)[0] for prompt, own in ASKED]
    assert together == alone
    assert llm.generate(prompts[::-1] * 2, params[::-1] * 2, model=model) == alone[::-1] * 2

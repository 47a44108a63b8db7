"""The demo pair in fp32: what the ensemble decodes is exact, alone and in company."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prompts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_core.config import Config
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM, Completion
from ensemble_core.members.base import Feed
from ensemble_core.members.loading.checkpoints import resolve_folder
from ensemble_core.members.local import LocalMember

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


@pytest.fixture(scope="module")
def llm(demo_config: Config) -> Iterator[LLM]:
    members = {
        name: member.model_copy(update={"dtype": "float32", "kv_memory": 3 * 2**30})
        for name, member in demo_config.members.items()
    }
    engine = LLM(demo_config.model_copy(update={"members": members}))
    yield engine
    engine.close()
    del engine
    gc.collect()


def own_generate(config: Config, member: str, prompt: str) -> list[int]:
    """What the model's own `generate` in transformers makes of a prompt, greedily, in fp32."""
    folder = resolve_folder(config.members[member])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return [int(token) for token in tokens[0, inputs.input_ids.shape[1] :]]


@pytest.mark.parametrize("member", ["smollm2", "gemma3"])
def test_one_member_equals_its_own_generate_alone_and_in_a_batch(
    llm: LLM, demo_config: Config, member: str
) -> None:
    expected = own_generate(demo_config, member, PROMPTS[0])
    alone = llm.generate([PROMPTS[0]], GREEDY, model=member)[0]
    batch = llm.generate(PROMPTS, GREEDY, model=member)
    assert list(alone.token_ids) == expected
    assert list(batch[0].token_ids) == expected


def test_a_greedy_text_is_the_same_alone_and_among_sixteen(llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=8 + 2 * i, temperature=0.0 if i % 3 == 0 else 0.9, top_p=0.95, seed=i)
        for i in range(16)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] + " and" * (i // 4) for i in range(16)]
    together = llm.generate(prompts, params, model="duet")
    for i in (0, 6, 15):
        alone = llm.generate([prompts[i]], params[i], model="duet")[0]
        assert (alone.text, alone.token_ids) == (together[i].text, together[i].token_ids)
    assert_all_free(llm)


def test_seeded_sampling_is_reproducible_in_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=0.8, seed=7)
    alone = llm.generate([PROMPTS[3]], params, model="duet-smollm2")[0]
    company = llm.generate([*PROMPTS[:3], PROMPTS[3]], params, model="duet-smollm2")[3]
    assert alone.text == company.text


@pytest.mark.parametrize(
    ("model", "assistant", "temperature"), [("duet", "smollm2", 0.0), ("duet-smollm2", "gemma3", 0.8)]
)
def test_no_draft_and_no_drafter_changes_a_text(llm: LLM, model: str, assistant: str, temperature: float) -> None:
    """Verify one token at a time, at its default, and with the assistant as drafter."""
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=3)
    ways: list[dict[str, Any]] = [{"draft": 1, "lookup": False}, {}, {"drafter": assistant}, {"drafter": "lookup"}]
    texts = [
        [
            answer.token_ids
            for answer in llm.generate(PROMPTS[:3], params, model, Overrides(mode="verify", mode_options=way))
        ]
        for way in ways
    ]
    assert all(each == texts[0] for each in texts)
    assert_all_free(llm)


def test_the_fused_text_differs_from_each_member_alone(llm: LLM) -> None:
    def texts(model: str) -> list[str]:
        short = SamplingParams(max_tokens=12, temperature=0.0)
        return [c.text for c in llm.generate(PROMPTS[:4], short, model=model)]

    assert len({tuple(texts(model)) for model in ("duet", "gemma3", "smollm2")}) == 3


def test_the_text_is_the_bytes_of_mains_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.0)
    completion: Completion = llm.generate(["Tab\tand emoji 😀:\n\n\n"], params, model="duet")[0]
    vocabulary = llm._engine.members["gemma3"].vocabulary
    joined = b"".join(vocabulary.text_bytes(token) for token in completion.token_ids)
    assert joined.decode("utf-8", "replace") == completion.text


def test_the_transfer_matrices_are_small_on_disk(demo_config: Config) -> None:
    pair = demo_config.matrices.folder / "gemma3+smollm2"
    sizes = [file.stat().st_size for file in pair.glob("*.centred.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 120e6


def assert_all_free(llm: LLM) -> None:
    for member in llm._engine.members.values():
        assert isinstance(member, LocalMember)
        member.check_cache()
        assert member.free_pages == member.num_pages


def test_members_side_by_side_answer_as_they_do_in_turn(llm: LLM) -> None:
    """Bit for bit, a prompt of a few hundred tokens and what follows it."""
    pool = llm._engine._pool
    assert pool._cores.costs.keys() == llm.members.keys() or torch.get_num_threads() == 1
    prompt = " ".join(PROMPTS) * 6
    feeds = {
        name: [[Feed(-1, ids, top_k=64)], [Feed(-1, ids[:3], top_k=64, wanted=3)]]
        for name in llm.members
        for ids in [llm.encode(name, prompt)]
    }
    together = [pool.forward({name: own[step] for name, own in feeds.items()}) for step in range(2)]
    for name in llm.members:
        pool.release(name, -1)
        for step, found in enumerate(together):
            alone = pool.forward({name: feeds[name][step]})[name].answers
            beside = found[name].answers
            assert alone is not None
            assert beside is not None
            assert torch.equal(alone.joined().token_ids, beside.joined().token_ids)
            assert torch.equal(alone.joined().logprobs, beside.joined().logprobs)
        pool.release(name, -1)

"""Scores and constraints of tiny real models in fp32, against the same models run directly by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import KINDS, Kind
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensemble_core.config_file import load_config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM, Completion
from ensemble_core.members.base import Feed, ask
from ensemble_core.transfer.build import build_matrices

ECHO = SamplingParams(max_tokens=0, echo=True, logprobs=1, temperature=0.0)
PROMPTS = ["The quick brown fox", "你好 world, " * 4, "x = 1\n\ty"]
CLOSE = {"abs": 1e-4}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """All kinds, a twin of llama, and ensembles; a budget that cuts every prompt in pieces."""
    folder = tmp_path_factory.mktemp("surface")
    options = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 160}
    members = {kind: {"model": str(tiny_checkpoints[kind]), **options} for kind in KINDS}
    raw: dict[str, Any] = {
        "members": members | {"twin": members["llama"]},
        "ensembles": {
            "twins": {"members": {"llama": 0.5, "twin": 0.5}, "main": "llama"},
            "duet": {"members": {"qwen3": 0.5, "llama": 0.5}, "main": "qwen3"},
        },
        "matrices": {"folder": str(folder / "matrices")},
        "scheduler": {"max_running": 8, "token_budget": 7, "num_candidates": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    build_matrices(load_config(folder / "config.yaml"), force=True, only_missing=False)
    made = LLM(folder / "config.yaml")
    yield made
    made.close()


@pytest.fixture(scope="module")
def originals(tiny_checkpoints: dict[Kind, Path]) -> dict[Kind, Any]:
    return {
        kind: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for kind, folder in tiny_checkpoints.items()
    }


@torch.no_grad()
def own_logprobs(original: Any, ids: list[int]) -> Tensor:
    """(T, V)"""
    logits = original(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=1)  # type: ignore[no-any-return]


def numbers(completion: Completion) -> list[float | None]:
    return [entry.logprob for entry in completion.prompt_logprobs]


@each_kind
def test_a_member_alone_scores_as_its_model(kind: Kind, llm: LLM, originals: dict[Kind, Any]) -> None:
    for completion in llm.generate(PROMPTS, ECHO, kind):
        ids = [entry.token_id for entry in completion.prompt_logprobs]
        own = own_logprobs(originals[kind], ids)
        first, *rest = completion.prompt_logprobs
        assert (first.logprob, first.top, completion.token_ids) == (None, (), ())
        expected = [own[i, token_id].item() for i, token_id in enumerate(ids[1:])]
        assert [entry.logprob for entry in rest] == pytest.approx(expected, **CLOSE)
        for row, entry in zip(own, rest, strict=False):
            best = max(logprob for _, _, logprob in entry.top)
            assert best == pytest.approx(row.max().item(), **CLOSE)
            gap = row.max() - row[entry.token_id]
            if gap > 1e-4 or gap == 0:
                assert (entry.logprob == best) == (gap == 0)


@each_kind
def test_ids_are_scored_as_they_are(kind: Kind, llm: LLM, originals: dict[Kind, Any]) -> None:
    ids = tuple(range(270, 300))
    (completion,) = llm.generate([ids], ECHO, kind)
    assert tuple(entry.token_id for entry in completion.prompt_logprobs) == ids
    assert completion.num_prompt_tokens == 30
    own = own_logprobs(originals[kind], list(ids))
    expected = [own[i, token_id].item() for i, token_id in enumerate(ids[1:])]
    assert numbers(completion)[1:] == pytest.approx(expected, **CLOSE)


def test_two_identical_members_score_as_one(llm: LLM) -> None:
    both, one = (llm.generate(PROMPTS, ECHO, model) for model in ("twins", "llama"))
    for left, right in zip(both, one, strict=True):
        assert numbers(left)[1:] == pytest.approx(numbers(right)[1:], **CLOSE)


def test_scores_are_the_same_alone_and_in_company(llm: LLM) -> None:
    prompts = PROMPTS * 2
    together = llm.generate(prompts, ECHO, "duet")
    for prompt, completion in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, ECHO, "duet")
        assert numbers(completion)[1:] == pytest.approx(numbers(alone)[1:], **CLOSE)


def test_an_assistant_whose_tokenizer_puts_a_space_in_front_is_heard(llm: LLM) -> None:
    for fused, single in zip(*(llm.generate(PROMPTS, ECHO, m) for m in ("duet", "qwen3")), strict=True):
        assert numbers(fused)[1:] != pytest.approx(numbers(single)[1:], abs=1e-2)


@pytest.mark.parametrize("model", ["llama", "gpt2", "duet"])
def test_offsets_find_the_tokens_in_the_prompt(llm: LLM, model: str) -> None:
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, ECHO, model), strict=True):
        offsets = [entry.text_offset for entry in completion.prompt_logprobs]
        assert offsets == sorted(offsets)
        for entry in completion.prompt_logprobs:
            plain = entry.text.isascii() and entry.text.strip() and not entry.text.startswith("bytes:")
            if plain and entry.text != "<s>":
                own = entry.text.lstrip() if entry.text_offset == 0 else entry.text
                assert prompt.startswith(own, entry.text_offset)


@pytest.mark.parametrize("model", ["llama", "gemma3", "qwen3", "gpt2", "duet"])
def test_constrained_text_parses_and_leaves_others_alone(llm: LLM, model: str) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {
                "kind": {"enum": ["cat", "dög"]},
                "age": {"type": "integer", "minimum": 0, "maximum": 99},
            },
            "required": ["kind", "age"],
            "additionalProperties": False,
        }
    )
    free = SamplingParams(max_tokens=12, temperature=0.0)
    bound = SamplingParams(max_tokens=120, temperature=0.0, form=TextForm("json", schema))
    (expected,) = llm.generate("An animal", free, model)
    done = llm.generate(["An animal"] * 2, [bound, free], model)
    assert done[0].finish_reason == "stop"
    value = json.loads(done[0].text)
    assert value.keys() == {"kind", "age"}
    assert value["kind"] in ("cat", "dög")
    assert 0 <= value["age"] <= 99
    assert done[1] == expected


@each_kind
def test_a_reused_prompt_is_a_fresh_prefill(kind: Kind, llm: LLM) -> None:
    member = llm._engine.members[kind]
    ids = [(7 * i) % 250 + 5 for i in range(30)]
    try:
        ask(member, [Feed(90_001, ids)], 10_000)
        assert member.reuse(90_002, ids[:29]) == 29
        member.forward([Feed(90_001, [5], 0, keep=3)])  # the copy stands by itself
        reused = ask(member, [Feed(90_002, ids[29:])], 10_000)
        fresh = ask(member, [Feed(90_003, ids)], 10_000)
        torch.testing.assert_close(reused.logprobs, fresh.logprobs, atol=2e-5, rtol=1e-5)
    finally:
        for seq_id in (90_001, 90_002, 90_003):
            member.release(seq_id)
    assert member.free_pages == member.num_pages

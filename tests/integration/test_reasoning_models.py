"""Reasoning of tiny real models: templates that open it, control tokens as markers, assistants with other tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import Kind

from ensemble_core.decoding.forms import one_of
from ensemble_core.decoding.requests import Conversation
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.llm import LLM, Completion
from ensemble_core.text.variables import TemplateVariables

OPENING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: <|im_start|>{% if enable_thinking is defined and not enable_thinking %}"
    "\n<|im_end|>{% endif %}\n{% endif %}"
)
CONTROL = {"start": "<|im_start|>", "end": "<|im_end|>"}  # control tokens of the tiny Qwen
TEXT_OPENING = OPENING.replace("<|im_start|>", "<think>").replace("<|im_end|>", "</think>")


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("reasoning")
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 160}
    members = {
        "control": {"model": str(tiny_checkpoints["qwen3"]), "chat_template": OPENING, "reasoning": CONTROL},
        "texts": {"model": str(tiny_checkpoints["llama"]), "chat_template": TEXT_OPENING},  # found, not configured
        "plain": {"model": str(tiny_checkpoints["gpt2"])},
    }
    pool = {"fusion": {"name": "projection"}}
    raw: dict[str, Any] = {
        "members": {name: member | options for name, member in members.items()},
        "ensembles": {
            "both": {"members": {"control": 0.6, "texts": 0.4}, "main": "control"} | pool,
            "drafts": {"members": {"texts": 0.6, "plain": 0.4}, "main": "texts", "mode": "verify"} | pool,
        },
        "scheduler": {"max_running": 8, "num_candidates": 64},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    made = LLM(folder / "config.yaml")
    yield made
    made.close()


def asked(llm: LLM, model: str, variables: dict[str, Any] | None = None, **params: Any) -> Completion:
    prompt = Conversation(
        ({"role": "user", "content": "The quick brown fox"},), variables=TemplateVariables(variables or {})
    )
    own = SamplingParams(**{"max_tokens": 40, "temperature": 0.0, "ignore_eos": True} | params)
    (found,) = llm.generate([prompt], own, model)
    return found


@pytest.mark.parametrize("model", ["control", "both"])
@pytest.mark.parametrize("budget", [0, 5])
def test_control_tokens_as_markers_are_seen_and_forced(llm: LLM, model: str, budget: int) -> None:
    found = asked(llm, model, thinking_token_budget=budget)
    assert found.num_reasoning_tokens is not None
    assert budget <= found.num_reasoning_tokens <= budget + 3
    (end,) = (found.token_ids[found.num_reasoning_tokens],)
    assert llm.members["control"].vocabulary.name_of(end) == "<|im_end|>"
    assert found.text
    assert bool(found.reasoning) == (budget > 0)
    assert "<|im" not in found.text + found.reasoning


@pytest.mark.parametrize("model", ["texts", "drafts"])
@pytest.mark.parametrize("budget", [0, 1, 9])
def test_markers_of_text_are_found_in_the_template_and_forced(llm: LLM, model: str, budget: int) -> None:
    found = asked(llm, model, thinking_token_budget=budget)
    assert found.num_reasoning_tokens is not None
    assert budget <= found.num_reasoning_tokens <= budget + 3
    spell = llm.members["texts"].vocabulary.text_bytes
    rest = b"".join(map(spell, found.token_ids[found.num_reasoning_tokens :]))
    assert rest.startswith(b"</think>")
    assert found.text == rest.removeprefix(b"</think>").decode("utf-8", "replace").lstrip()


@pytest.mark.parametrize("model", ["control", "both", "texts", "drafts"])
def test_a_form_binds_what_follows(llm: LLM, model: str) -> None:
    found = asked(llm, model, thinking_token_budget=4, form=one_of(["yes", "no"]), ignore_eos=False)
    assert (found.text in ("yes", "no"), found.finish_reason) == (True, "stop")
    assert found.reasoning


@pytest.mark.parametrize("model", ["control", "both", "texts", "drafts"])
def test_a_closed_block_is_no_reasoning(llm: LLM, model: str) -> None:
    found = asked(llm, model, {"enable_thinking": False}, form=one_of(["yes", "no"]), ignore_eos=False)
    assert found.text in ("yes", "no")
    assert (found.reasoning, found.num_reasoning_tokens) == ("", 0)
    free = asked(llm, model)
    assert free.num_reasoning_tokens == 40
    assert free.text == ""


def test_a_variable_that_a_template_cannot_take_is_the_requests_fault(llm: LLM) -> None:
    strict = OPENING.replace("not enable_thinking", "enable_thinking > 5")
    llm._admission._speakers["control"].prompts._template = strict
    try:
        with pytest.raises(
            InvalidRequestError, match="chat_template_kwargs: the chat template of member 'control'"
        ):
            asked(llm, "control", {"enable_thinking": "x"})
    finally:
        llm._admission._speakers["control"].prompts._template = OPENING
    assert json.dumps(asked(llm, "control").reasoning)


def test_a_model_without_markers_takes_no_budget(llm: LLM) -> None:
    assert asked(llm, "plain").num_reasoning_tokens is None
    with pytest.raises(InvalidRequestError, match="no markers"):
        asked(llm, "plain", thinking_token_budget=3)

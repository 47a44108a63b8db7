"""`deterministic: true`: every answer is the same, bit for bit, alone and in any crowd."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prompts import together
from tiny_models import Kind
from torch import Tensor

from ensemble_core.config_file import load_config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import ConfigError, UnsupportedModelError
from ensemble_core.llm import LLM
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.body import linear
from ensemble_core.members.body.linear import Linear
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.transfer.build import build_matrices

HEAD = "She said that the other one was there when they went to the house of the mother. "
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=5)
SEEDED = replace(GREEDY, temperature=1.0, seed=7)
# (model, prompt, parameters): short and long, plain and shaped, of every kind that asks a member for more.
ASKED: list[tuple[str, str, SamplingParams]] = [
    ("duet", "The quick", GREEDY),
    ("duet", "The quick brown fox", replace(SEEDED, top_p=0.9)),
    ("duet", HEAD * 4 + "0 1 2", replace(GREEDY, max_tokens=9)),
    ("duet", HEAD * 4 + "x = 1\n", replace(SEEDED, seed=-3, max_tokens=40)),
    ("duet", "你好", replace(SEEDED, logit_bias=tuple((i, 1.5) for i in range(20, 90)))),
    ("duet", HEAD, replace(GREEDY, form=TextForm("json", SCHEMA), max_tokens=16)),
    ("duet", HEAD + "one", replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)),
    ("duet", HEAD + "two", replace(SEEDED, echo=True, max_tokens=3)),
    ("weighed", HEAD + "three", replace(SEEDED, min_p=0.01)),
    ("whole", "ba ke mi", replace(SEEDED, top_k=40)),
    ("llama", "The quick", SEEDED),
    ("gemma3", HEAD * 2, GREEDY),
    ("qwen3", "def add", replace(GREEDY, echo=True, max_tokens=0)),
    ("trio", "Numbers: 0", SEEDED),
]


def settings(folder: Path, checkpoints: dict[Kind, Path], **member: Any) -> Path:
    options = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 512} | member
    duo = {"members": {"llama": 0.5, "gemma3": 0.5}, "main": "llama"}
    raw = {
        "members": {kind: {"model": str(checkpoints[kind]), **options} for kind in ("llama", "gemma3", "qwen3")},
        "ensembles": {
            "duet": duo,
            "weighed": duo | {"weighting": {"by": "perplexity"}},
            "whole": duo | {"fusion": {"name": "relative", "options": {"support": "full"}}},
            "trio": {"members": {"qwen3": 0.4, "gemma3": 0.3, "llama": 0.3}, "main": "qwen3"},
        },
        "matrices": {"folder": str(folder / "matrices"), "min_retained": 0.0},
        "scheduler": {"max_running": 6, "token_budget": 48, "num_candidates": 64},
        "deterministic": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    build_matrices(load_config(path), force=False, only_missing=True)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deterministic")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request: pytest.FixtureRequest, folder: Path, tiny_checkpoints: dict[Kind, Path]) -> Iterator[LLM]:
    engine = LLM(settings(folder, tiny_checkpoints, dtype=request.param))
    yield engine
    engine.close()


def test_an_answer_is_the_same_alone_and_in_any_crowd(llm: LLM) -> None:
    """Texts, ids and every log-probability: with nothing cached, with prefixes cached, in another order, crowded."""
    alone = [together(llm, [one])[0] for one in ASKED]
    assert together(llm, ASKED) == alone
    assert together(llm, ASKED[::-1]) == alone[::-1]
    crowd = together(llm, ASKED[::2] * 3 + ASKED[1::2])
    assert crowd == alone[::2] * 3 + alone[1::2]
    assert [together(llm, [one])[0] for one in ASKED[::-1]] == alone[::-1]
    assert all(answer.logprobs or answer.prompt_logprobs for answer in alone)


@pytest.mark.parametrize(
    ("kind", "options", "lacking"),
    [
        ("llama", {"kv_cache": "paged"}, "kv_cache: rows"),
        ("llama", {"dtype": "float16"}, "compiled attention"),
        ("llama", {"forward": "transformers"}, "families"),
        ("gpt2", {}, "families"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    kind: Kind, options: dict[str, str], lacking: str, tiny_checkpoints: dict[Kind, Path]
) -> None:
    config = MemberConfig.model_validate(
        {"model": "m", "device": "cpu", "kv_memory": "1MiB", "max_len": 64} | options
    )
    folder = tiny_checkpoints[kind]
    vocabulary = load_vocabulary("tiny", config.model_copy(update={"model": str(folder)}))
    load_member("tiny", config, folder, vocabulary)
    with pytest.raises(ConfigError, match=rf"deterministic: true.*'tiny'.*{lacking}"):
        load_member("tiny", config, folder, vocabulary, deterministic=True)


def test_products_that_depend_on_other_rows_are_found_at_load(
    folder: Path, tiny_checkpoints: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the layer itself where every number of rows is a sum of its own, and else by the proof of the member."""
    product = Linear._product

    def by_place(self: Linear, x: Tensor) -> Tensor:
        return product(self, x) + 1e-3 * torch.arange(len(x)).unsqueeze(1)

    def by_number(self: Linear, x: Tensor) -> Tensor:
        return product(self, x) + 1e-6 * (len(x) % 7)

    path = settings(folder, tiny_checkpoints)
    monkeypatch.setattr(linear, "_agreeing", linear._agreeing.__wrapped__)
    monkeypatch.setattr(Linear, "_product", by_place)
    with pytest.raises(ConfigError, match=r"deterministic: true.*where a row stands"):
        LLM(path)
    monkeypatch.setattr(Linear, "_product", by_number)
    LLM(path).close()  # what agrees is found, and serves
    monkeypatch.setattr(linear, "_agreeing", lambda *_: (1, 2, 4, 64))
    with pytest.raises(UnsupportedModelError, match="alone and in a crowd"):
        LLM(path)

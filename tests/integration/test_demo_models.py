"""The demo pair as `make models` leaves it: whole, unquantized, licensed, quick to load, able to speak."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ensemble_core.config import Config
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, pull, resolve_folder
from ensemble_core.text.vocabulary import PROOF_SAMPLES
from ensemble_core.transfer.matrix import common_anchors

MEMBERS = ["smollm2", "gemma3"]
NUM_PARAMETERS = {"smollm2": 134_515_008, "gemma3": 268_098_176}
VOCAB_SIZES = {"smollm2": 49_152, "gemma3": 262_144}
NOTICES = {"smollm2": {"LICENSE"}, "gemma3": {"GEMMA_TERMS.html", "NOTICE.md"}}
STOP_TOKENS = {"smollm2": {b"<|im_end|>"}, "gemma3": {b"<eos>"}}
NUM_SHARED = 46_145  # tokens that both have, byte for byte

every_member = pytest.mark.parametrize("name", MEMBERS)


def folder(config: Config, name: str) -> Path:
    return resolve_folder(config.members[name])


@every_member
def test_weights_are_plain_bf16(demo_config: Config, name: str) -> None:
    config = json.loads((folder(demo_config, name) / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(folder(demo_config, name) / "model.safetensors", "pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
    assert {part.get_dtype() for part in slices} == {"BF16"}
    assert sum(torch.Size(part.get_shape()).numel() for part in slices) == NUM_PARAMETERS[name]


@every_member
def test_licences_lie_beside_the_weights(demo_config: Config, name: str) -> None:
    for notice in NOTICES[name]:
        assert (folder(demo_config, name) / notice).stat().st_size > 300


def test_a_second_pull_is_instant(demo_config: Config) -> None:
    start = time.perf_counter()
    folders = dict(pull(demo_config))
    assert time.perf_counter() - start < 1.0
    assert folders == {name: folder(demo_config, name) for name in MEMBERS}


@every_member
def test_the_vocabulary_is_the_models(demo_config: Config, name: str) -> None:
    vocabulary = load_vocabulary(name, demo_config.members[name])
    assert len(vocabulary) == VOCAB_SIZES[name]
    assert {vocabulary.tokens[i] for i in vocabulary.stop_ids} == STOP_TOKENS[name]
    for sample in PROOF_SAMPLES:
        ids = vocabulary.encode(sample)
        assert b"".join(vocabulary.tokens[i] for i in ids) == sample.encode()
        assert ids == load_tokenizer(name, demo_config.members[name])(sample, add_special_tokens=False).input_ids


def test_the_pair_shares_its_anchors(demo_config: Config) -> None:
    vocabularies = [load_vocabulary(name, demo_config.members[name]) for name in MEMBERS]
    assert len(common_anchors(vocabularies).tokens) == NUM_SHARED


@every_member
def test_it_knows_english(demo_config: Config, name: str) -> None:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder(demo_config, name), dtype=torch.bfloat16)
    assert time.perf_counter() - start < 20.0  # a second on a quiet machine; the GGUF way takes 13 to 35
    text = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain is Madrid."
    ids = load_tokenizer(name, demo_config.members[name])(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss  # mean negative log-likelihood; a broken model is near log V = 11
    assert loss < 2.5, loss

"""Prompt likelihoods of real models against transformers' own logits, and the weights that come of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import KINDS, Kind
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.local import LocalMember

MEMBER = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 160}
PAIR: tuple[Kind, Kind] = ("llama", "gpt2")
TAU = 0.1
PROMPTS = [
    "The quick brown fox jumps over",
    "你好，世界。",
    "def add(left, right):\n\treturn left",
    "one two " * 20,
]


@torch.no_grad()
def own_logprobs(folder: Path, ids: list[int]) -> Tensor:
    """(T, V): transformers' own, uncached."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=1)  # type: ignore[no-any-return]


def load(folder: Path) -> LocalMember:
    config = MemberConfig.model_validate({"model": str(folder)} | MEMBER)
    return load_member("tiny", config, folder, load_vocabulary("tiny", config))


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_transformers_own_whatever_else_is_fed(
    tiny_checkpoints: dict[Kind, Path], kind: Kind
) -> None:
    member = load(tiny_checkpoints[kind])
    ids = torch.randint(3, len(member.vocabulary) - 3, (40,), generator=torch.Generator().manual_seed(7)).tolist()
    asked = (*ids[1:20], -1, *ids[21:], -1)
    feeds = [Feed(0, ids[:9], 2), Feed(1, ids, 1, (), asked), Feed(2, ids[:30], 0)]
    found = member.forward([replace(feed, top_k=16) for feed in feeds])
    own = own_logprobs(tiny_checkpoints[kind], ids)
    expected = sum(own[at, token_id].item() for at, token_id in enumerate(asked) if token_id >= 0)
    assert found.likelihoods == (0.0, pytest.approx(expected, rel=1e-5), 0.0)
    plain = member.forward([Feed(3, ids[:9], 2, top_k=16), Feed(4, ids, 1, top_k=16)])
    assert plain.likelihoods == ()
    torch.testing.assert_close(found.joined().logprobs, plain.joined().logprobs, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    raw: dict[str, Any] = {
        "members": {kind: {"model": str(tiny_checkpoints[kind])} | MEMBER for kind in PAIR},
        "ensembles": {
            "duet": {
                "members": dict.fromkeys(PAIR, 0.5),
                "main": PAIR[0],
                "fusion": {"name": "projection"},
                "weighting": {"by": "perplexity", "tau": TAU},
            }
        },
        "scheduler": {"token_budget": 16, "num_candidates": 64},
    }
    path = tmp_path_factory.mktemp("perplexity") / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    made = LLM(path)
    yield made
    made.close()


def expected(llm: LLM, folders: dict[Kind, Path], prompt: str) -> list[float]:
    """softmax(-NLL / tau) with equal factors: nats per byte behind the first token that spells text."""
    rates = []
    for kind in PAIR:
        ids, spell = llm.encode(kind, prompt), llm.members[kind].vocabulary.text_bytes
        own = own_logprobs(folders[kind], ids)
        first = min(row for row, token_id in enumerate(ids) if spell(token_id))
        counted = [row for row in range(first + 1, len(ids)) if spell(ids[row])]
        num_bytes = sum(len(spell(ids[row])) for row in counted)
        rates.append(-sum(own[row - 1, ids[row]].item() for row in counted) / num_bytes)
    raw = [math.exp(-rate / TAU) for rate in rates]
    return [part / sum(raw) for part in raw]


def test_weights_are_those_of_a_slow_reference_in_chunks_and_together(
    llm: LLM, tiny_checkpoints: dict[Kind, Path]
) -> None:
    """The budget is 16 tokens a step, so prompts are prefilled in chunks beside each other."""
    params = SamplingParams(max_tokens=4, temperature=0.0)
    together = llm._requests(PROMPTS, params, "duet", None)
    assert list(llm._run(together))
    for prompt, request in zip(PROMPTS, together, strict=True):
        (alone,) = llm._requests([prompt], params, "duet", None)
        assert list(llm._run([alone]))
        assert request.recipe.weights == pytest.approx(alone.recipe.weights, rel=1e-4)
        assert request.recipe.weights == pytest.approx(expected(llm, tiny_checkpoints, prompt), rel=1e-3)
    assert len({round(request.recipe.weights[0], 2) for request in together}) > 1

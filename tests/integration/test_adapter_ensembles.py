"""Adapters are members like others: in the list of models, in fusions of every kind, in councils, in matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_adapters import LARGE, peft_logprobs, reweigh, tiny_adapter
from tiny_models import Kind

from ensemble_core.config_file import load_config
from ensemble_core.councils.artefact import fingerprints
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.evaluation.collect import _identity
from ensemble_core.llm import LLM
from ensemble_core.transfer.build import build_matrices

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, logprobs=5)
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def path(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("poet", "critic", "silent")):
        tiny_adapter(tiny_checkpoints["llama"], folder / name, seed, **(LARGE if name == "critic" else {}))
    reweigh(folder / "silent", lambda weights: {name: weight * 0 for name, weight in weights.items()})
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "max_len": 256}
    adapters = {name: {"base": "llama", "adapter": f"./{name}"} for name in ("poet", "critic", "silent")}

    def ensemble(*members: str, **options: Any) -> dict[str, Any]:
        return {"members": dict.fromkeys(members, 1), "main": members[0], **options}

    raw = {
        "members": {
            "llama": {"model": str(tiny_checkpoints["llama"]), **settings},
            **adapters,
            "gemma3": {"model": str(tiny_checkpoints["gemma3"]), **settings},
        },
        "ensembles": {
            "family": ensemble("llama", "poet", "critic", fusion="projection"),
            "related": ensemble("gemma3", "poet", "critic", "llama"),
            "own": ensemble("poet", "llama"),
            "plain": ensemble("gemma3", "llama"),
            "steered": ensemble(
                "gemma3",
                "poet",
                "llama",
                fusion={"name": "contrastive", "options": {"expert": "poet", "base": "llama", "alpha": 0.5}},
            ),
            "still": ensemble(
                "gemma3",
                "silent",
                "llama",
                fusion={"name": "contrastive", "options": {"expert": "silent", "base": "llama"}},
            ),
            "poll": {
                "kind": "vote",
                "models": ["llama", "poet", "critic"],
                "answer": "exact",
                "stop_early": False,
            },
        },
        "matrices": {"folder": "./matrices"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    build_matrices(load_config(path), force=True, only_missing=False)
    made = LLM(path)
    yield made
    for member in made.members.values():
        assert member.free_pages == member.num_pages
    made.close()


def test_they_are_in_the_list_of_models(llm: LLM) -> None:
    members = {model.name: model.parent for model in llm.models if model.kind == "member"}
    assert members == {"llama": None, "poet": "llama", "critic": "llama", "silent": "llama", "gemma3": None}


def test_a_matrix_is_its_bases(llm: LLM, path: Path) -> None:
    files = {
        str(file.relative_to(path.parent / "matrices"))
        for file in (path.parent / "matrices").rglob("*.safetensors")
    }
    recipe = "centred"
    both = {f"gemma3+llama/{name}.{recipe}.safetensors" for name in ("gemma3", "llama")}
    assert files == {*both, f"llama/llama.{recipe}.safetensors"}


def test_a_member_alone_writes_what_peft_writes(llm: LLM, path: Path, tiny_checkpoints: dict[Kind, Path]) -> None:
    """Greedily, token by token."""
    for name in ("poet", "critic"):
        (completion,) = llm.generate(PROMPT, GREEDY, name)
        ids = llm.encode(name, PROMPT)
        for token_id in completion.token_ids:
            logprobs = peft_logprobs(tiny_checkpoints["llama"], path.parent / name, ids)[-1]
            assert token_id == int(logprobs.argmax())
            ids = [*ids, token_id]


def test_an_adapter_that_adds_nothing_is_its_base(llm: LLM) -> None:
    expected = llm.generate(PROMPT, GREEDY, "llama")[0]
    found = llm.generate(PROMPT, GREEDY, "silent")[0]
    assert found.token_ids == expected.token_ids
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_contrast_is_what_training_changed(llm: LLM) -> None:
    """Between a base and an adapter that adds nothing there is none."""
    main = llm.generate(PROMPT, GREEDY, "gemma3")[0].text
    assert llm.generate(PROMPT, GREEDY, "still")[0].text == main
    assert llm.generate(PROMPT, GREEDY, "steered")[0].text != main


@pytest.mark.parametrize("model", ["family", "related", "own", "steered"])
def test_fusions_take_them_as_members(model: str, llm: LLM) -> None:
    alone = llm.generate(PROMPT, GREEDY, model)
    together = llm.generate([PROMPT, "你好", PROMPT + " jumps"], replace(GREEDY, max_tokens=8), model)
    assert together[0].token_ids == alone[0].token_ids[:8]


def test_what_a_request_takes_out_of_an_ensemble_has_its_matrix(llm: LLM) -> None:
    """Without the adapters the rest fuses as if they had never been there."""
    expected = llm.generate(PROMPT, GREEDY, "plain")[0]
    found = llm.generate(PROMPT, GREEDY, "related", Overrides(members=("gemma3", "llama")))[0]
    assert found.token_ids == expected.token_ids


def test_councils_call_them(llm: LLM) -> None:
    (completion,) = llm.generate("1 + 1 =", SamplingParams(max_tokens=6), "poll")
    assert completion.text


def test_what_is_learned_of_an_adapter_is_not_its_bases(path: Path) -> None:
    """Routers and stored scores belong to the adapter: to its files, too."""
    config = load_config(path)
    assert len(set(fingerprints(config, ["llama", "poet", "critic"]).values())) == 3
    before = _identity(config.members["poet"])
    assert before != _identity(config.members["llama"])
    (path.parent / "poet" / "README.md").write_text("trained again")
    assert _identity(config.members["poet"]) != before

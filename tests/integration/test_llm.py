"""The offline API over two tiny real models with different tokenizers, and over fakes for what goes wrong."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from tiny_models import Kind

from ensemble_core import factory
from ensemble_core.config_file import load_config
from ensemble_core.decoding.requests import GenerationRequest, Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.errors import InvalidRequestError, ModelNotFoundError, UnisonoError
from ensemble_core.llm import LLM
from ensemble_core.transfer.build import build_matrices

GREEDY = SamplingParams(max_tokens=16, temperature=0.0)
PROMPTS = ["The quick brown", "你好", "x = 1\n", "one two three " * 8]


@pytest.fixture(scope="module")
def llm(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("llm")
    member = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 256}
    duet = {"members": {"llama": 0.5, "gpt2": 0.5}, "main": "llama"}
    raw = {
        "members": {kind: {"model": str(tiny_checkpoints[kind]), **member} for kind in ("llama", "gpt2")},
        "ensembles": {"duet": duet, "lenient": duet | {"on_member_failure": "drop"}},
        "matrices": {"folder": str(folder / "matrices")},
        "scheduler": {"max_waiting": 3, "max_running": 4, "token_budget": 32},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    config = load_config(folder / "config.yaml")
    build_matrices(config, force=True, only_missing=False)
    made = LLM(folder / "config.yaml")
    yield made
    made.close()


def assert_free(llm: LLM) -> None:
    assert all(member.free_pages == member.num_pages for member in llm._engine.members.values())


def test_answers_come_in_the_order_of_prompts_whatever_the_batch(llm: LLM) -> None:
    prompts = PROMPTS * 3  # more than may wait and run
    together = llm.generate(prompts, GREEDY)
    assert together[:4] == together[4:8] == together[8:]
    for prompt, completion in zip(PROMPTS, together, strict=False):
        assert llm.generate(prompt, GREEDY) == [completion]
    assert_free(llm)


@pytest.mark.parametrize("cause", ["exception", "non_finite"])
@pytest.mark.parametrize("num_good", [0, 1, 5])
def test_a_real_member_that_fails_is_done_without(
    llm: LLM, cause: str, num_good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache is in order afterwards, and the next answer is that of all members again."""
    member: Any = llm.members["gpt2"]
    whole, body, calls = llm.generate(PROMPTS, GREEDY, "lenient"), member._body, iter(range(1000))

    def failing(*arguments: Any) -> Any:
        logits = body(*arguments)
        if next(calls) < num_good:
            return logits
        if cause == "exception":
            raise RuntimeError("out of luck")
        return logits * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(member, "_body", failing)
        done = llm.generate(PROMPTS, GREEDY, "lenient")
    assert all(each.dropped == {"gpt2": cause} for each in done)
    if num_good == 0:
        alone = llm.generate(PROMPTS, GREEDY, "duet", Overrides(members=("llama",)))
        assert [each.token_ids for each in done] == [each.token_ids for each in alone]
    assert_free(llm)
    member.check_cache()
    assert llm.generate(PROMPTS, GREEDY, "lenient") == whole


def test_each_prompt_has_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, temperature=0.0) for n in (1, 5, 9)]
    done = llm.generate(["a", "b", "c"], params)
    assert all(len(c.token_ids) <= p.max_tokens for c, p in zip(done, params, strict=True))
    assert len(done[0].token_ids) == 1
    with pytest.raises(InvalidRequestError, match="params"):
        llm.generate(["a", "b"], params)


@pytest.mark.parametrize("model", ["duet", "llama", "gpt2"])
def test_a_stream_joins_to_the_text(llm: LLM, model: str) -> None:
    for prompt in PROMPTS:
        assert "".join(llm.stream(prompt, GREEDY, model)) == llm.generate(prompt, GREEDY, model)[0].text


def test_one_member_of_the_ensemble_is_that_member(llm: LLM) -> None:
    alone = llm.generate(PROMPTS, GREEDY, "llama")
    assert llm.generate(PROMPTS, GREEDY, "duet", Overrides(members=("llama",))) == alone


def test_wrong_requests_are_refused(llm: LLM) -> None:
    with pytest.raises(ModelNotFoundError, match="duet"):
        llm.generate("a", GREEDY, "nobody")
    with pytest.raises(InvalidRequestError, match="context"):
        llm.generate("a", SamplingParams(max_tokens=256))
    assert llm.generate([]) == []
    assert_free(llm)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeMember]:
    members = {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2),
    }
    monkeypatch.setattr(factory, "load", lambda config, sink: fake_loaded(config, members, sink))
    return members


def test_an_abandoned_stream_frees_its_pages(fakes: dict[str, FakeMember]) -> None:
    made = LLM(fake_config())
    stream = made.stream("abc", SamplingParams(max_tokens=100, temperature=0.0))
    assert next(stream)
    assert not fakes["alpha"].is_empty
    stream.close()  # type: ignore[attr-defined]
    assert all(member.is_empty for member in fakes.values())


def test_streams_that_are_read_in_turn_stay_apart(fakes: dict[str, FakeMember]) -> None:
    made = LLM(fake_config())
    prompts = ["abc", "de"]
    expected = [completion.text for completion in made.generate(prompts, GREEDY)]
    first, second = (made.stream(prompt, GREEDY) for prompt in prompts)
    texts = [next(first), next(second)]
    assert [c.text for c in made.generate(prompts, GREEDY)] == expected
    assert [texts[0] + "".join(first), texts[1] + "".join(second)] == expected
    assert all(member.is_empty for member in fakes.values())


def test_a_failed_member_is_an_error(fakes: dict[str, FakeMember]) -> None:
    made = LLM(fake_config())
    fakes["beta"].fails_on = {0, 1}
    with pytest.raises(UnisonoError, match="beta"):
        made.generate("abc", GREEDY)
    with pytest.raises(UnisonoError, match="beta"):
        list(made.stream("abc", GREEDY))
    assert len(made.generate("abc", GREEDY)[0].token_ids) == 16
    assert all(member.is_empty for member in fakes.values())


def test_nobody_watches_what_comes_as_a_whole(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    admit = llm._admission.admit_all

    def noting(requests: abc.Sequence[GenerationRequest]) -> list[Sequence]:
        seen.extend(request.watched for request in requests)
        return admit(requests)

    monkeypatch.setattr(llm._admission, "admit_all", noting)
    llm.generate(PROMPTS[:2], GREEDY)
    assert "".join(llm.stream(PROMPTS[0], GREEDY))
    assert seen == [False, False, True]

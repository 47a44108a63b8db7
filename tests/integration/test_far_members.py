"""Tiny members in processes of their own and on two Ray nodes: texts are those of one process, come what may."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prompts import together
from tiny_models import Kind

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import HostError, UnisonoError
from ensemble_core.llm import LLM, Completion, _completion
from ensemble_core.members.base import Feed
from ensemble_core.members.remote.far import FarMember
from ensemble_core.stats import Stats
from ensemble_core.transfer.build import build_matrices

HEAD = "She said that the other one was there when they went to the house of the mother. "
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=5)
SEEDED = replace(GREEDY, temperature=1.0, seed=7)
ASKED: list[tuple[str, str, SamplingParams]] = [
    ("duet", "The quick brown fox", GREEDY),
    ("duet", HEAD * 4 + "0 1 2", replace(SEEDED, max_tokens=9)),
    ("duet", HEAD * 4 + "0 1 3", GREEDY),
    ("duet", "你好", replace(SEEDED, logit_bias=tuple((i, 1.5) for i in range(20, 60)))),
    ("duet", HEAD + "two", replace(SEEDED, echo=True, max_tokens=3)),
    ("verified", HEAD + "In a village", GREEDY),
    ("verified", "Numbers: 0 1 2", SEEDED),
    ("weighed", HEAD + "three", replace(SEEDED, min_p=0.01)),
    ("gemma3", HEAD * 2, GREEDY),
    ("trio", "def add(left", replace(GREEDY, form=TextForm("json", '{"type": "object"}'), max_tokens=12)),
]
TIMEOUT = 1.5


def raw(folder: Path, checkpoints: dict[Kind, Path], hosts: dict[str, Any]) -> dict[str, Any]:
    options = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 512}
    duo = {"members": {"llama": 0.5, "gemma3": 0.5}, "main": "llama"}
    members = {kind: {"model": str(checkpoints[kind]), **options} for kind in ("llama", "gemma3", "qwen3")}
    for name, host in hosts.items():
        members[name]["host"] = host
    return {
        "members": members,
        "ensembles": {
            "duet": duo,
            "verified": duo | {"mode": "verify"},
            "weighed": duo | {"weighting": {"by": "perplexity"}},
            "trio": {"members": {"qwen3": 0.4, "gemma3": 0.3, "llama": 0.3}, "main": "qwen3"},
            "dropping": duo | {"on_member_failure": "drop"},
        },
        "matrices": {"folder": str(folder / "matrices"), "min_retained": 0.0},
        "scheduler": {"max_running": 6, "token_budget": 48, "num_candidates": 64, "member_timeout": TIMEOUT},
        "deterministic": True,
    }


def config_of(folder: Path, checkpoints: dict[Kind, Path], hosts: dict[str, Any]) -> Config:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw(folder, checkpoints, hosts)), encoding="utf-8")
    return load_config(path)


@dataclass
class Pair:
    """An ensemble with members elsewhere, and what the same ensemble in this process writes."""

    llm: LLM
    expected: list[Completion]
    records: list[Stats]

    @property
    def far(self) -> FarMember:
        member = self.llm.members["gemma3"]
        assert isinstance(member, FarMember)
        return member

    def wait(self, lost: bool, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while (self.far.lost is not None) is not lost:
            assert time.monotonic() < deadline, self.far.lost
            time.sleep(0.02)

    def assert_all_free(self) -> None:
        for name, member in self.llm.members.items():
            assert member.free_pages == member.num_pages, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("far")


@pytest.fixture(scope="module")
def expected(folder: Path, tiny_checkpoints: dict[Kind, Path]) -> list[Completion]:
    config = config_of(folder, tiny_checkpoints, {})
    build_matrices(config, force=False, only_missing=True)
    llm = LLM(config)
    found = together(llm, ASKED)
    llm.close()
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two nodes; the address of the first. The second alone has what `node_b` asks for."""
    cluster_utils = importlib.import_module("ray.cluster_utils")
    made = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2, resources={"node_b": 2})
    made.wait_for_nodes()
    yield str(made.address)
    ray = importlib.import_module("ray")
    ray.shutdown()
    made.shutdown()


HOSTS: dict[str, dict[str, Any]] = {
    "process": {"gemma3": {"process": {"num_threads": 1}}, "llama": {"process": {"num_threads": 1}}},
    "ray": {"gemma3": {"ray": {"num_cpus": 1, "resources": {"node_b": 1}}}, "qwen3": {"ray": {"num_cpus": 1}}},
}


@pytest.fixture(scope="module", params=["process", pytest.param("ray", marks=pytest.mark.slow)])
def pair(
    request: pytest.FixtureRequest, folder: Path, tiny_checkpoints: dict[Kind, Path], expected: list[Completion]
) -> Iterator[Pair]:
    hosts = HOSTS[request.param]
    if request.param == "ray":
        address = request.getfixturevalue("cluster")
        hosts = {name: {"ray": host["ray"] | {"address": address}} for name, host in hosts.items()}
    threads = torch.get_num_threads()
    records: list[Stats] = []
    llm = LLM(config_of(folder, tiny_checkpoints, hosts), records.append)
    yield Pair(llm, expected, records)
    llm.close()
    torch.set_num_threads(threads)


def same(left: Completion, right: Completion) -> bool:
    return (left.text, left.token_ids, left.finish_reason, left.logprobs, left.prompt_logprobs) == (
        right.text,
        right.token_ids,
        right.finish_reason,
        right.logprobs,
        right.prompt_logprobs,
    )


def test_texts_are_those_of_the_ensemble_in_one_process(pair: Pair) -> None:
    """Chunked prompts, reused prefixes, rollbacks, weights, scores and schemas; every bit of every number."""
    for _ in range(2):  # the second time with cached prefixes
        for asked, mine, theirs in zip(ASKED, together(pair.llm, ASKED), pair.expected, strict=True):
            assert same(mine, theirs), asked
    pair.assert_all_free()


def test_one_after_the_other_as_well(pair: Pair) -> None:
    for (model, prompt, params), theirs in zip(ASKED[:6], pair.expected, strict=False):
        assert same(pair.llm.generate([prompt], params, model=model)[0], theirs)


def test_an_abort_gives_everything_back(pair: Pair) -> None:
    stream = pair.llm.stream(HEAD, GREEDY, model="duet")
    next(stream)
    stream.close()
    pair.assert_all_free()
    assert same(together(pair.llm, ASKED[:1])[0], pair.expected[0])


def begun(pair: Pair, model: str, num: int = 4) -> tuple[Any, list[Any]]:
    """A request under way: its engine's step function, and the outputs so far."""
    (sequence,) = pair.llm._requests([HEAD], [replace(GREEDY, max_tokens=40)], model, None)
    outputs: list[Any] = []
    news = pair.llm._run([sequence])
    while sum(len(output.token_ids) for output in outputs) < num:
        outputs.append(next(news)[1])
    return news, outputs


def rest(news: Any, outputs: list[Any]) -> Completion | str:
    outputs += [output for _, output in news]
    return outputs[-1].error or _completion(outputs)


def alone(pair: Pair, ids: list[int], num: int) -> tuple[int, ...]:
    """What main alone writes behind some tokens: the ensemble without the member that is gone."""
    params, overrides = replace(GREEDY, max_tokens=num), Overrides(members=("llama",))
    return pair.llm.generate([tuple(ids)], params, model="duet", overrides=overrides)[0].token_ids


def test_killed_in_mid_stream_the_request_goes_on(pair: Pair) -> None:
    news, outputs = begun(pair, "dropping")
    os.kill(pair.far.facts.pid, signal.SIGKILL)
    done = rest(news, outputs)
    assert isinstance(done, Completion)
    assert dict(done.dropped) == {"gemma3": "lost"}
    assert done.finish_reason == "length"
    pair.assert_all_free()
    before = [token_id for output in outputs if not output.dropped for token_id in output.token_ids]
    left = done.token_ids[len(before) :]
    assert before
    assert left == alone(pair, [*pair.llm.encode("llama", HEAD), *before], len(left))
    pair.wait(lost=False)
    assert same(together(pair.llm, ASKED[:1])[0], pair.expected[0]), "it serves again, from an empty cache"


def test_killed_in_mid_stream_a_request_that_needs_it_fails_at_once(pair: Pair) -> None:
    """And the restarted far end never answers from the cache that is gone."""
    pair.wait(lost=False)
    before, (news, outputs) = pair.far.incarnation, begun(pair, "duet")
    pair.far.forward([Feed(-5, [5, 6, 7])])
    os.kill(pair.far.facts.pid, signal.SIGKILL)
    started = time.monotonic()
    error = rest(news, outputs)
    assert time.monotonic() - started < 1.0
    assert isinstance(error, str)
    assert "member 'gemma3'" in error
    assert pair.far.incarnation == before + 1
    pair.assert_all_free()
    pair.wait(lost=False)
    with pytest.raises(UnisonoError, match="3 tokens of sequence -5 are to be kept"):
        pair.far.forward([Feed(-5, [8], keep=3)])
    pair.assert_all_free()
    assert same(together(pair.llm, ASKED[:1])[0], pair.expected[0])


def test_stopped_and_continued(pair: Pair) -> None:
    """The time-out acts on the call; the call that comes back late harms nobody."""
    pair.wait(lost=False)
    before, (news, outputs) = pair.far.incarnation, begun(pair, "dropping")
    os.kill(pair.far.facts.pid, signal.SIGSTOP)
    started = time.monotonic()
    done = rest(news, outputs)
    assert TIMEOUT * 0.8 < time.monotonic() - started < TIMEOUT + 2.0
    assert isinstance(done, Completion)
    assert dict(done.dropped) == {"gemma3": "timeout"}
    os.kill(pair.far.facts.pid, signal.SIGCONT)
    deadline = time.monotonic() + 20.0
    while pair.llm._engine._pool.busy:
        assert time.monotonic() < deadline
        pair.llm._engine.step()
        time.sleep(0.05)
    assert pair.far.incarnation == before
    assert same(together(pair.llm, ASKED[:1])[0], pair.expected[0])
    pair.assert_all_free()


def test_stopped_while_idle_it_is_lost_within_the_time_out(pair: Pair) -> None:
    pair.wait(lost=False)
    os.kill(pair.far.facts.pid, signal.SIGSTOP)
    started = time.monotonic()
    pair.wait(lost=True, seconds=TIMEOUT + 3.0)
    assert time.monotonic() - started < TIMEOUT + 3.0
    os.kill(pair.far.facts.pid, signal.SIGCONT)
    pair.wait(lost=False, seconds=20.0)
    assert same(together(pair.llm, ASKED[:1])[0], pair.expected[0])


def test_a_model_that_cannot_be_loaded_elsewhere(
    folder: Path, tiny_checkpoints: dict[Kind, Path], expected: list[Completion]
) -> None:
    """Its tokenizer is here, its weights are not there; the others are given up."""
    bare = folder / "gemma3"
    shutil.copytree(tiny_checkpoints["gemma3"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = raw(folder, tiny_checkpoints | {"gemma3": bare}, HOSTS["process"])
    settings["matrices"]["folder"] = str(folder / "none")
    settings["ensembles"] = {}
    with pytest.raises(
        HostError, match=r"'gemma3': cannot be loaded in its process: CheckpointError: .*safetensors"
    ):
        LLM(Config.model_validate(settings))

"""Members over pages in an engine: texts are those of rows, whoever shares, is preempted or comes back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import Kind
from torch import Tensor

from ensemble_core.config_file import load_config
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body.graphs import GraphedBody, eagerly
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.local import LocalMember
from ensemble_core.transfer.build import build_matrices

HEAD = "She said that the other one was there when they went to the house. "
PROMPTS = [HEAD + end for end in ("The quick", "你好", "x = 1\n", "one two three ", "ba ke mi", "0 1 2 3")]
GREEDY = SamplingParams(max_tokens=40, temperature=0.0)


def duet(folder: Path, checkpoints: dict[Kind, Path], max_running: int = 6, **member: Any) -> LLM:
    """An ensemble of two tiny models, one with a sliding window."""
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": "8MiB", "max_len": 256} | member
    raw = {
        "members": {kind: {"model": str(checkpoints[kind]), **settings} for kind in ("llama", "gemma3")},
        "ensembles": {"duet": {"members": {"llama": 0.5, "gemma3": 0.5}, "main": "llama"}},
        "matrices": {"folder": str(folder / "matrices")},
        "scheduler": {"max_waiting": 32, "max_running": max_running, "token_budget": 48},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    build_matrices(load_config(path), force=False, only_missing=True)
    return LLM(path)


def texts(llm: LLM, prompts: list[str]) -> list[list[int]]:
    found = [completion.token_ids for completion in llm.generate(prompts, GREEDY)]
    for member in llm._engine.members.values():
        assert isinstance(member, LocalMember)
        member.check_cache()
        assert member.free_pages == member.num_pages
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paged")


@pytest.fixture(scope="module")
def by_rows(folder: Path, tiny_checkpoints: dict[Kind, Path]) -> list[list[int]]:
    llm = duet(folder, tiny_checkpoints, kv_cache="rows")
    try:
        return texts(llm, PROMPTS)
    finally:
        llm.close()


def test_texts_are_those_of_rows(
    folder: Path, tiny_checkpoints: dict[Kind, Path], by_rows: list[list[int]]
) -> None:
    """Once with nothing cached, and again with prompts and texts that are."""
    llm = duet(folder, tiny_checkpoints, kv_cache="paged")
    member = llm._engine.members["llama"]
    assert (member.page_size, member.num_pages) == (16, 8 * 2**20 // (16 * 3 * 2 * 2 * 16 * 4) - 1)
    assert texts(llm, PROMPTS) == by_rows
    assert texts(llm, PROMPTS) == by_rows
    assert texts(llm, PROMPTS[::-1]) == by_rows[::-1]
    llm.close()


def test_whoever_is_preempted_ends_with_the_same_text(
    folder: Path, tiny_checkpoints: dict[Kind, Path], by_rows: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Eighteen run in the 84 pages of llama, where each comes to need seven or so."""
    llm = duet(folder, tiny_checkpoints, max_running=18, kv_cache="paged", kv_memory="1MiB")
    with caplog.at_level(logging.INFO, "ensemble_core.decoding.telemetry"):
        many = texts(llm, PROMPTS * 3)
    llm.close()
    assert many == by_rows * 3
    assert "is preempted" in caplog.text


def load(folder: Path, capture: Any = None, **options: Any) -> LocalMember:
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": "1MiB", "max_len": 64, "kv_cache": "paged"}
    config = MemberConfig.model_validate({"model": str(folder), **settings, **options})
    return load_member("tiny", config, folder, load_vocabulary("tiny", config), max_batch=4, capture=capture)


def test_graphs_that_answer_as_the_body_are_adopted(tiny_checkpoints: dict[Kind, Path]) -> None:
    member = load(tiny_checkpoints["llama"], eagerly)
    assert isinstance(member._body, GraphedBody)
    assert member._body.sizes == [1, 2, 4]
    assert member.free_pages == member.num_pages


def stale(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A graph that was captured and never computes again."""
    logits = compute().clone()
    return lambda: logits


def refused(_: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("capture", "reason"), [(stale, "sequences differs"), (refused, "not permitted")])
def test_graphs_that_fail_or_differ_are_done_without(
    capture: Any, reason: str, tiny_checkpoints: dict[Kind, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "ensemble_core.members.loading.models"):
        member = load(tiny_checkpoints["llama"], capture)
    assert "tiny: decoding goes on without graphs" in caplog.text
    assert reason in caplog.text
    assert not isinstance(member._body, GraphedBody)
    assert member.free_pages == member.num_pages
    member.check_cache()
    assert ask(member, [Feed(1, [5, 6, 7])], 4).logprobs.isfinite().all()


def test_graphs_need_pages(tiny_checkpoints: dict[Kind, Path]) -> None:
    member = load(tiny_checkpoints["llama"], eagerly, kv_cache="rows")
    assert not isinstance(member._body, GraphedBody)
    assert not isinstance(member._cache, PagedCache)

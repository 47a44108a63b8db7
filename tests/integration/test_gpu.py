"""On a CUDA device: tiny members answer as on the CPU, through pages, kernels, graphs and streams."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import KINDS, Kind
from torch import Tensor

from ensemble_core.config_file import load_config
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.llm import LLM
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.attention.pages import by_gathering, by_kernel
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body.graphs import GraphedBody, cuda_graphs
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.local import LocalMember
from ensemble_core.members.parallel import MemberPool
from ensemble_core.transfer.build import build_matrices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda:0")
WHOLE = 10_000


def load(folder: Path, name: str = "tiny", graphs: bool = False, **options: Any) -> LocalMember:
    settings = {"dtype": "float32", "device": "cuda:0", "kv_memory": "64MiB", "max_len": 400} | options
    config = MemberConfig.model_validate({"model": str(folder), **settings})
    capture = cuda_graphs(GPU) if graphs else None
    return load_member(name, config, folder, load_vocabulary(name, config), max_batch=8, capture=capture)


def answers(member: LocalMember, seed: int) -> list[Tensor]:
    """Whole distributions of a walk: prefill in chunks, decode, rollback, reuse, release; on the CPU."""
    rng, found = random.Random(seed), []
    texts = {seq: [rng.randrange(3, 390) for _ in range(380)] for seq in range(9)}
    done = dict.fromkeys(texts, 0)
    for _ in range(30):
        seqs = rng.sample(sorted(texts), rng.randint(1, 9))
        counts = [1] * len(seqs) if rng.random() < 0.6 else [rng.randint(1, 60) for _ in seqs]
        feeds = []
        for seq, count in zip(seqs, counts, strict=True):
            begin = min(done[seq], 380 - count)
            feeds.append(Feed(seq, texts[seq][begin : begin + count], keep=begin))
            done[seq] = begin + count
        found.append(ask(member, feeds, WHOLE).logprobs.cpu())
        gone = rng.choice(seqs)
        member.release(gone, keep=True)
        done[gone] = member.reuse(gone, texts[gone])
    for seq in texts:
        member.release(seq)
    member.check_cache()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graphs", [False, True])
def test_float32_is_the_cpus(tiny_checkpoints: dict[Kind, Path], kind: Kind, graphs: bool) -> None:
    """By copies of pages; with graphs that are captured and replayed."""
    member = load(tiny_checkpoints[kind], graphs=graphs)
    assert member._attention is by_gathering
    flat = kind != "gpt2"
    assert not graphs or not flat or isinstance(member._body, GraphedBody)
    cpu = load(tiny_checkpoints[kind], device="cpu", kv_cache="paged")
    for found, own in zip(answers(member, 1), answers(cpu, 1), strict=True):
        torch.testing.assert_close(found, own, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_through_the_kernel_differs_by_rounding_alone(
    tiny_checkpoints: dict[Kind, Path], kind: Kind
) -> None:
    """As far from float32 numbers as the plain attention on the CPU, in total variation."""
    member = load(tiny_checkpoints[kind], dtype="bfloat16")
    assert member._attention is by_kernel
    assert kind == "gpt2" or isinstance(member._body, GraphedBody)
    exact = answers(load(tiny_checkpoints[kind], device="cpu", kv_cache="paged"), 2)
    plain = answers(load(tiny_checkpoints[kind], device="cpu", kv_cache="paged", dtype="bfloat16"), 2)
    found = answers(member, 2)
    assert distance(found, exact) <= 2 * distance(plain, exact)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Total variation, averaged over answers."""
    parts = [(a.exp() - b.exp()).abs().sum(dim=1) / 2 for a, b in zip(left, right, strict=True)]
    return float(torch.cat(parts).mean())


def test_members_of_one_gpu_do_not_disturb_each_other(tiny_checkpoints: dict[Kind, Path]) -> None:
    """Forwards of two members queued side by side, many times over; their clocks run."""
    members = {kind: load(tiny_checkpoints[kind], kind) for kind in ("llama", "gemma3")}
    pool = MemberPool(members)
    ids = [5 + i for i in range(300)]
    alone = {name: ask(member, [Feed(1, ids, 300)], WHOLE).logprobs.cpu() for name, member in members.items()}
    for turn in range(20):
        for member in members.values():
            member.release(1)
        found = pool.forward({name: [Feed(1, ids, 300, top_k=WHOLE)] for name in members})
        for name, attempt in found.items():
            assert attempt.answers is not None
            logprobs = attempt.answers.of(0).logprobs.cpu()
            torch.testing.assert_close(logprobs, alone[name], msg=f"turn {turn}, {name}")
            assert attempt.started < attempt.ended
    pool.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_an_ensembles_texts_are_the_cpus(
    graphs: bool, tiny_checkpoints: dict[Kind, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if graphs:
        from ensemble_core import factory

        def with_graphs(*given: Any, **keywords: Any) -> LocalMember:
            return load_member(*given, **keywords, capture=cuda_graphs(GPU) if given[1].device != "cpu" else None)

        monkeypatch.setattr(factory, "load_member", with_graphs)
    texts = [run(tmp_path, tiny_checkpoints, device) for device in ("cpu", "cuda:0")]
    assert texts[0] == texts[1]


def run(folder: Path, checkpoints: dict[Kind, Path], device: str) -> list[list[int]]:
    member = {"dtype": "float32", "device": device, "kv_memory": "64MiB", "max_len": 256}
    raw = {
        "members": {kind: {"model": str(checkpoints[kind]), **member} for kind in ("llama", "gemma3")},
        "ensembles": {"duet": {"members": {"llama": 0.5, "gemma3": 0.5}, "main": "llama"}},
        "matrices": {"folder": str(folder / "matrices")},
        "scheduler": {"max_running": 4, "token_budget": 48},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    build_matrices(load_config(path), force=False, only_missing=True)
    llm = LLM(path)
    prompts = ["The quick brown", "你好", "x = 1\n", "one two three " * 8, "She said that the other one"]
    done = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0))
    llm.close()
    return [completion.token_ids for completion in done]


@pytest.mark.parametrize("graphs", [False, True])
def test_a_member_that_sleeps_leaves_the_gpu_and_comes_back(
    tiny_checkpoints: dict[Kind, Path], graphs: bool
) -> None:
    member = load(tiny_checkpoints["llama"], graphs=graphs)
    before, held = answers(member, 5), torch.cuda.memory_allocated()
    member.sleep()
    torch.cuda.synchronize()
    assert set(member.memory_bytes()) == {"cpu"}
    assert torch.cuda.memory_allocated() < held - 32 * 2**20
    member.wake()
    assert set(member.memory_bytes()) == {"cuda:0"}
    assert all(map(torch.equal, answers(member, 5), before))


def test_a_captured_step_reads_what_its_buffers_say_now() -> None:
    source = torch.zeros(3, device=GPU)
    compute: Callable[[], Tensor] = lambda: source * 2 + 1  # noqa: E731
    replay = cuda_graphs(GPU)(compute)
    for value in (0.0, 4.0, -1.5):
        source.fill_(value)
        assert replay().tolist() == [2 * value + 1] * 3

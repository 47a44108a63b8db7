"""Tensors of a body go to the machine's memory and back, and a member that has slept answers as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Kind
from torch import nn

from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, Sleeper, ask
from ensemble_core.members.body.graphs import Capture, eagerly
from ensemble_core.members.body.linear import Head, merged
from ensemble_core.members.kernels.plain import PLAIN
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.local import LocalMember
from ensemble_core.members.parking import Parked, tensors_of


def test_what_shares_memory_shares_it_afterwards() -> None:
    embedding = nn.Embedding(6, 4)
    tied = embedding.weight.data
    part, apart = tied[2:4], torch.arange(3.0)
    body = [embedding, (tied, {"part": part}), apart]
    before = [tensor.clone() for tensor in tensors_of(body)]
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(body)}
    parked = Parked(body, lambda _: True)
    assert {t.untyped_storage().data_ptr() for t in tensors_of(body)}.isdisjoint(places)
    parked.bring_back()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(body), strict=True))
    part.fill_(7.0)
    assert embedding.weight[2:4].eq(7.0).all()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(body)}) == 2


def test_no_tensor_of_a_layer_is_forgotten() -> None:
    layer = merged(nn.Linear(4, 3), nn.Linear(4, 2), kernels=PLAIN)
    head = Head(torch.ones(5, 4), None, PLAIN)
    found = {id(tensor) for tensor in tensors_of([layer, head])}
    assert {id(layer.weight), id(layer.bias), id(head.parts[0].weight)} <= found


def test_what_lies_on_the_cpu_stays() -> None:
    weight = torch.ones(3)
    place = weight.data_ptr()
    Parked([weight]).bring_back()
    assert weight.data_ptr() == place


@pytest.mark.parametrize(
    ("kind", "kv_cache", "capture"),
    [("llama", "rows", None), ("gemma3", "paged", None), ("gpt2", "rows", None), ("qwen3", "paged", eagerly)],
)
def test_a_member_that_has_slept_answers_as_before(
    tiny_checkpoints: dict[Kind, Path], kind: Kind, kv_cache: str, capture: Capture | None
) -> None:
    """Also where steps are graphs, which are made anew over the new cache."""
    config = MemberConfig.model_validate(
        {
            "model": str(tiny_checkpoints[kind]),
            "device": "cpu",
            "kv_memory": 2**21,
            "max_len": 64,
            "kv_cache": kv_cache,
        }
    )
    member = load_member(
        "m", config, tiny_checkpoints[kind], load_vocabulary("m", config), max_batch=4, capture=capture
    )
    assert isinstance(member, Sleeper)
    before, weight = answered(member), sum(member.memory_bytes().values())
    member.release(1, keep=True)
    member.sleep()
    assert sum(member.memory_bytes().values()) <= weight - 2**20
    member.wake()
    assert sum(member.memory_bytes().values()) == weight
    assert member.free_pages == member.num_pages
    assert member.reuse(2, list(range(3, 40))) == 0, "what was cached is gone"
    for _ in range(2):
        assert torch.equal(answered(member), before)
        member.release(1, keep=True)
    assert member.reuse(2, list(range(3, 40)))
    member.release(2)
    member.check_cache()


def answered(member: LocalMember) -> torch.Tensor:
    """A prompt, then a step of one token."""
    read = ask(member, [Feed(1, list(range(3, 40)))], 8)
    return torch.cat([read.logprobs, ask(member, [Feed(1, [40])], 8).logprobs])

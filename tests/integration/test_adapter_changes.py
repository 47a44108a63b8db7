"""Real adapters that come and go around weights that serve: the same answers, and no weight twice or moved."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import LARGE, peft_logprobs, tiny_adapter
from tiny_models import Kind
from torch import Tensor

from ensemble_core.config import Config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.engine import Engine
from ensemble_core.errors import InvalidRequestError, UnsupportedModelError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body.flat import FlatBody
from ensemble_core.members.loading.memory import give_back, plan_caches
from ensemble_core.members.local import LocalMember
from ensemble_core.members.parking import tensors_of
from ensemble_core.runtime import Runtime

SETTINGS = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "max_len": 160}
IDS = list(range(5, 45))
WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "transformers": {"forward": "transformers"},
    "paged": {"kv_cache": "paged"},
}


@pytest.fixture(scope="module")
def adapters(tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("coming")
    base = tiny_checkpoints["llama"]
    return {
        "poet": tiny_adapter(base, folder / "poet", 1),
        "critic": tiny_adapter(base, folder / "critic", 2, **LARGE),
    }


@pytest.fixture(params=WAYS)
def runtime(
    request: pytest.FixtureRequest, tiny_checkpoints: dict[Kind, Path], adapters: dict[str, Path]
) -> Iterator[Runtime]:
    base = {"model": str(tiny_checkpoints["llama"]), **SETTINGS, **WAYS[request.param]}
    members = {"llama": base, "poet": {"base": "llama", "adapter": str(adapters["poet"])}}
    made = Runtime(Config.model_validate({"members": members}))
    made.start()
    made.wait_ready()
    yield made
    made.stop()


def member_of(engine: Engine, name: str) -> LocalMember:
    member = engine.members[name]
    assert isinstance(member, LocalMember)
    return member


async def answers(runtime: Runtime, name: str) -> Tensor:
    def asked(engine: Engine) -> Tensor:
        member = member_of(engine, name)
        found = ask(member, [Feed(-9, IDS, len(IDS))], 10_000).logprobs.clone()
        member.release(-9)
        return found

    return await runtime.on_engine(asked)


async def weights(runtime: Runtime, name: str) -> dict[int, Tensor]:
    return await runtime.on_engine(
        lambda engine: {id(tensor): tensor for tensor in tensors_of(member_of(engine, name).body)}
    )


def test_an_adapter_comes_back_and_another_one_comes(
    runtime: Runtime, adapters: dict[str, Path], tiny_checkpoints: dict[Kind, Path]
) -> None:
    async def act() -> None:
        base = set(await weights(runtime, "llama"))
        before = {name: await answers(runtime, name) for name in ("llama", "poet")}
        memory = {each.name: each.memory for each in (await runtime.changes.report()).members}
        for _ in range(2):
            await runtime.changes.unload("poet")
            assert torch.equal(await answers(runtime, "llama"), before["llama"])
            assert (await runtime.changes.load("poet")).memory == memory["poet"]
            assert torch.equal(await answers(runtime, "poet"), before["poet"])
        await runtime.changes.load("critic", {"base": "llama", "adapter": str(adapters["critic"])})
        expected = peft_logprobs(tiny_checkpoints["llama"], adapters["critic"], IDS)
        torch.testing.assert_close(await answers(runtime, "critic"), expected, atol=2e-5, rtol=1e-5)
        assert set(await weights(runtime, "llama")) == base, "the base has the weights that it had"
        large = {key for key, tensor in (await weights(runtime, "llama")).items() if tensor.numel() > 4096}
        assert large, "something is shared"
        for name in ("poet", "critic"):
            assert large <= set(await weights(runtime, name)), "and no weight is there twice"
        voices = runtime.loaded().voices
        assert len({id(voices[name].speaker.grammars) for name in ("llama", "poet", "critic")}) == 1
        params = SamplingParams(max_tokens=4, temperature=0.0)
        stream = await runtime.submit([GenerationRequest("r", "critic", "The fox", params)])
        assert [output async for _, output in stream][-1].finish_reason == "length"

    asyncio.run(act())


def test_an_adapter_that_sleeps_leaves_the_weights_to_its_base(runtime: Runtime, monkeypatch: Any) -> None:
    """Where they lie on a GPU they would move; what would is what `Parked` is given."""
    moved: list[int] = []

    class Watched:
        def __init__(self, body: object) -> None:
            moved.append(len(tensors_of(body)))

        def bring_back(self) -> None:
            """Nothing was moved."""

    monkeypatch.setattr("ensemble_core.members.local.Parked", Watched)

    async def act() -> None:
        before = {name: await answers(runtime, name) for name in ("llama", "poet")}
        report = await runtime.changes.sleep("poet")
        assert moved == [0]
        assert 0 < sum(report.memory.values()) < 2**20, "its own weights alone"
        assert torch.equal(await answers(runtime, "llama"), before["llama"])
        await runtime.changes.wake("poet")
        assert torch.equal(await answers(runtime, "poet"), before["poet"])
        await runtime.changes.unload("poet")
        await runtime.changes.sleep("llama")
        assert moved[-1] > 10, "alone the base parks all it has"
        await runtime.changes.wake("llama")
        await runtime.changes.load("poet")
        assert torch.equal(await answers(runtime, "poet"), before["poet"])

    asyncio.run(act())


def test_what_an_adapter_had_is_given_back(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the flat forward without a search for circles: the base's weights, which stay, are not taken for a leak."""
    searched: list[bool] = []

    def noted(*, circles: bool = True) -> None:
        searched.append(circles)
        give_back(circles=circles)

    monkeypatch.setattr("ensemble_core.doorway.give_back", noted)

    async def act() -> None:
        base = set(await weights(runtime, "llama"))
        own = [weakref.ref(each) for key, each in (await weights(runtime, "poet")).items() if key not in base]
        assert own
        flat = await runtime.on_engine(lambda engine: isinstance(member_of(engine, "poet").body, FlatBody))
        await runtime.changes.unload("poet")
        assert not [each for each in own if each() is not None]
        assert searched == [False] or not flat

    asyncio.run(act())


def test_what_cannot_be_served_changes_nothing(
    runtime: Runtime, adapters: dict[str, Path], tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    other = tiny_adapter(tiny_checkpoints["llama"], tmp_path / "odd", 3, modules_to_save=["lm_head"])

    async def act() -> None:
        before = await answers(runtime, "llama")
        with pytest.raises((UnsupportedModelError, InvalidRequestError), match="odd"):
            await runtime.changes.load("odd", {"base": "llama", "adapter": str(other)})
        assert [model.name for model in runtime.models()] == ["llama", "poet"]
        with pytest.raises(
            InvalidRequestError, match=r"members.odd.dtype: 'bfloat16', but the weights are those of"
        ):
            await runtime.changes.load(
                "odd", {"base": "llama", "adapter": str(adapters["critic"]), "dtype": "bfloat16"}
            )
        assert torch.equal(await answers(runtime, "llama"), before)

    asyncio.run(act())


def test_the_plan_leaves_room_for_the_base_that_is_read_once_more(
    tiny_checkpoints: dict[Kind, Path],
    adapters: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = MemberConfig.model_validate({"model": str(tiny_checkpoints["llama"]), **SETTINGS})
    added = own.model_copy(update={"base": "llama", "adapter": str(adapters["poet"])})

    def planned(members: dict[str, MemberConfig]) -> float:
        """GiB of weights that the plan counts."""
        caplog.clear()
        with caplog.at_level("INFO", logger="ensemble_core.members.loading.memory"):
            plan_caches(members, dict.fromkeys(members, tiny_checkpoints["llama"]), 2)
        return sum(record.args[2] for record in caplog.records)

    monkeypatch.setattr("ensemble_core.members.loading.memory._gib", lambda size: size)
    assert planned({"poet": added}) == planned({"llama": own, "poet": added}) > planned({"llama": own})

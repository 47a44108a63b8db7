"""Members of tiny models, here and in a process of their own, that go and come back through the real factory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tiny_models import Kind

from ensemble_core.config import Config
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError, MemberAwayError
from ensemble_core.runtime import Runtime


async def text(runtime: Runtime, model: str) -> str:
    request = GenerationRequest("r", model, "abc", SamplingParams(max_tokens=6, temperature=0.0))
    return "".join([output.text async for _, output in await runtime.submit([request])])


def test_members_here_and_elsewhere_go_and_come_back(tiny_checkpoints: dict[Kind, Path]) -> None:
    own = {"device": "cpu", "kv_memory": 2**21, "max_len": 64}
    config = Config.model_validate(
        {
            "members": {
                "here": {"model": str(tiny_checkpoints["llama"]), **own},
                "there": {"model": str(tiny_checkpoints["qwen3"]), **own, "host": {"process": {"num_threads": 1}}},
            },
            "ensembles": {"duo": {"members": {"here": 1, "there": 1}, "main": "here", "fusion": "projection"}},
        }
    )
    runtime = Runtime(config)
    runtime.start()
    runtime.wait_ready()

    async def act() -> None:
        models = ("duo", "here", "there")
        before = [await text(runtime, model) for model in models]
        for name in ("there", "here"):
            assert (await runtime.changes.unload(name)).standing.state == "unloaded"
            with pytest.raises(MemberAwayError, match=name):
                await text(runtime, "duo")
            assert (await runtime.changes.load(name)).standing.state == "ready"
            assert [await text(runtime, model) for model in models] == before
        with pytest.raises(InvalidRequestError, match="lives elsewhere and cannot sleep"):
            await runtime.changes.sleep("there")
        await runtime.changes.sleep("here")
        await runtime.changes.wake("here")
        assert [await text(runtime, model) for model in models] == before
        await runtime.changes.load("third", {"model": str(tiny_checkpoints["gpt2"]), **own})
        recipe = {"members": {"third": 1, "there": 1}, "main": "third"}
        with pytest.raises(InvalidRequestError, match="unisono build"):
            await runtime.changes.put_recipe("relative", recipe)
        await runtime.changes.put_recipe("pair", {**recipe, "fusion": "projection"})
        assert await text(runtime, "pair")

    try:
        asyncio.run(asyncio.wait_for(act(), 240.0))
    finally:
        runtime.stop()

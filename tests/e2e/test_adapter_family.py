"""SmolLM2 with two adapters in a real server process: one model in memory, three members in every kind of recipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml
from processes import ROOT, served
from tiny_adapters import LARGE, tiny_adapter

from ensemble_core.config import Config
from ensemble_core.members.loading.checkpoints import resolve_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(demo_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """configs/adapters.yaml, with random adapters that PEFT writes."""
    folder = tmp_path_factory.mktemp("adapters")
    base = resolve_folder(demo_config.members["smollm2"])
    raw = yaml.safe_load((ROOT / "configs" / "adapters.yaml").read_text())
    raw.setdefault("server", {})["admin_keys"] = ["sk-admin"]
    raw["matrices"]["folder"] = str(ROOT / "matrices")
    for seed, name in enumerate(("poet", "critic")):
        raw["members"][name]["adapter"] = str(tiny_adapter(base, folder / name, seed, 0.2, **LARGE))
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    with served(folder / "config.yaml", folder / "server.log") as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, model: str, **fields: Any) -> str:
    sent: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, **fields}
    return str(client.completions.create(model=model, prompt="The sea was calm, and", **sent).choices[0].text)


def test_every_model_answers(client: openai.OpenAI) -> None:
    models = {model.id: model.model_extra or {} for model in client.models.list().data}
    assert {name for name, extra in models.items() if extra["parent"] == "smollm2"} == {"poet", "critic"}
    said = {name: complete(client, name) for name in models if models[name]["kind"] != "council"}
    assert all(said.values())
    assert said["poet"] != said["smollm2"] != said["critic"]
    answer = client.chat.completions.create(
        model="panel", messages=[{"role": "user", "content": "What is 6 + 7?"}], max_tokens=8, seed=1
    )
    assert answer.choices[0].message.content


def test_an_adapter_costs_little_beside_its_base(url: str) -> None:
    """By the server's own metric, less the caches: an adapter's weights are a small part of its base's."""
    text = httpx.get(f"{url}/metrics").text
    sizes = {
        name: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        for name in ("smollm2", "poet", "critic")
        if line.startswith("unisono_member_memory_bytes") and f'member="{name}"' in line
    }
    cache = 360 * 2**20
    assert sizes["smollm2"] - cache > 250e6
    assert 0 < sizes["poet"] - cache < 0.1 * (sizes["smollm2"] - cache)
    assert sizes["critic"] < sizes["poet"]


def test_no_prefix_is_shared_between_a_base_and_its_adapters(url: str, client: openai.OpenAI) -> None:
    prompt = f"It is {time.time()}. " + "The sea was calm, and the boats lay still. " * 12
    hits = []
    for model in ("smollm2", "poet", "poet"):
        client.completions.create(model=model, prompt=prompt, max_tokens=1)
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = [
            line for line in lines if line.startswith("unisono_prefix_cache_hit_tokens_total") and '"poet"' in line
        ]
        hits.append(sum(float(line.rpartition(" ")[2]) for line in found))
    assert hits[0] == hits[1] < hits[2]


def test_an_adapter_comes_back_as_it_was_and_its_base_stays_meanwhile(url: str, client: openai.OpenAI) -> None:
    def change(path: str) -> httpx.Response:
        headers = {"Authorization": "Bearer sk-admin"}
        return httpx.post(f"{url}/v1/admin/members/{path}", headers=headers, timeout=300)

    before = {model: complete(client, model) for model in ("smollm2", "poet")}
    for leave in ("unload", "sleep"):
        refused = change(f"smollm2/{leave}")
        assert refused.status_code == 409
        assert "shares its weights with the adapters critic, poet" in refused.json()["error"]["message"]
    assert change("poet/unload").json()["state"] == "unloaded"
    with pytest.raises(openai.InternalServerError, match="'poet' lacks the member 'poet'"):
        complete(client, "poet")
    assert complete(client, "smollm2") == before["smollm2"]
    loaded = change("poet/load")
    assert loaded.status_code == 200, loaded.text
    assert complete(client, "poet") == before["poet"]

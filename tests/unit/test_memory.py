"""Cache sizes planned from memory: fair, bounded, and refused where nothing fits."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from tiny_models import KINDS, Kind
from transformers import AutoModelForCausalLM

from ensemble_core.errors import ConfigError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading import memory
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.memory import SHARE, cgroup_rooms, free_memory, plan_caches, share_out
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.loading.placement import PAGE_SIZES, page_size

GIB = 2**30


def member(folder: Path, **options: object) -> MemberConfig:
    return MemberConfig.model_validate({"model": str(folder), "device": "cpu", "max_len": 64} | options)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: size)


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_fair(seed: int) -> None:
    """Against water rising in vessels of different heights, a drop at a time."""
    rng = random.Random(seed)
    most = {f"m{i}": rng.randint(1, 30) for i in range(rng.randint(1, 5))}
    room = rng.randint(0, 100)
    shares, level, left = dict.fromkeys(most, 0), 0, room
    while left and any(shares[name] < most[name] for name in most):
        level += 1
        for name in most:
            if left and shares[name] < min(level, most[name]):
                shares[name] += 1
                left -= 1
    found = share_out(room, most)
    assert sum(found.values()) == sum(shares.values()) == min(room, sum(most.values()))
    assert all(abs(found[name] - shares[name]) <= len(most) for name in most)
    assert all(found[name] <= most[name] for name in most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_planned_is_what_the_member_takes(
    kind: Kind, dtype: str, tiny_checkpoints: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for all: exactly `max_running` rows."""
    free(monkeypatch, GIB)
    folder = tiny_checkpoints[kind]
    max_running = 256
    planned = plan_caches({"tiny": member(folder, dtype=dtype)}, {"tiny": folder}, max_running)["tiny"]
    loaded = load_member("tiny", planned, folder, load_vocabulary("tiny", planned))
    assert loaded.num_pages == max_running
    assert planned.cache_bytes == sum(loaded._cache.num_bytes().values())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_as_they_are_loaded(kind: Kind, tiny_checkpoints: dict[Kind, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[kind], dtype=torch.bfloat16)
    own = sum(parameter.numel() for parameter in model.parameters())
    assert memory._weight_bytes(tiny_checkpoints[kind], torch.bfloat16) == 2 * own
    assert memory._weight_bytes(tiny_checkpoints[kind], None) == 4 * own


def test_members_of_a_device_share_what_weights_and_fixed_caches_leave(
    tiny_checkpoints: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoints["llama"]
    folders = dict.fromkeys("abc", folder)
    weights = 3 * memory._weight_bytes(folder, None)
    free(monkeypatch, weights + 40 * 2**20)
    members = {"a": member(folder), "b": member(folder, kv_memory="4MiB"), "c": member(folder)}
    with caplog.at_level(logging.INFO, "ensemble_core.members.loading.memory"):
        planned = plan_caches(members, folders, 100_000)
    sizes = {name: each.cache_bytes for name, each in planned.items()}
    assert sizes["b"] == 4 * 2**20
    assert sizes["a"] == sizes["c"] == int(SHARE["cpu"] * 36 * 2**20) // 2
    assert [record.getMessage().split()[1] for record in caplog.records] == ["a", "b", "c"]
    assert f"{sizes['a'] // memory._need('a', members['a'], folder).sequence} sequences of 64" in caplog.text


def test_what_one_member_does_not_need_goes_to_the_others() -> None:
    assert share_out(100, {"small": 10, "large": 1000, "other": 60}) == {"small": 10, "other": 45, "large": 45}


def test_no_room_is_refused_with_what_to_do(
    tiny_checkpoints: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoints["llama"]
    free(monkeypatch, memory._weight_bytes(folder, None))
    with pytest.raises(
        ConfigError, match=r"members\.tiny\.kv_memory: auto leaves 0\.00 GiB on cpu.*lower max_len"
    ):
        plan_caches({"tiny": member(folder)}, {"tiny": folder}, 4)


def test_a_member_that_is_spread_gets_a_fixed_size(tiny_checkpoints: dict[Kind, Path]) -> None:
    folder = tiny_checkpoints["llama"]
    spread = MemberConfig(model=str(folder), device_map="auto")
    assert plan_caches({"tiny": spread}, {"tiny": folder}, 4)["tiny"].cache_bytes == 2 * GIB


def test_a_cgroup_bounds_what_is_free(tmp_path: Path) -> None:
    own = tmp_path / "self"
    own.write_text("0::/system/unit\n")
    for folder, limit in ((".", "max"), ("system", str(8 * GIB)), ("system/unit", str(6 * GIB))):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(limit + "\n")
        (tmp_path / folder / "memory.current").write_text(str(3 * GIB) + "\n")
    assert sorted(cgroup_rooms(tmp_path, own)) == [3 * GIB, 5 * GIB]
    assert list(cgroup_rooms(tmp_path / "nowhere", tmp_path / "nobody")) == []


def test_this_machine_has_memory() -> None:
    total = int(Path("/proc/meminfo").read_text(encoding="ascii").split()[1]) * 1024
    assert 0 < free_memory(torch.device("cpu")) <= total


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_pages_are_planned_whole_with_one_for_scratch(
    kind: Kind, tiny_checkpoints: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_len is no multiple of a page: every sequence gets the page that it ends within."""
    free(monkeypatch, GIB)
    folder, max_running = tiny_checkpoints[kind], 256
    asked = member(folder, kv_cache="paged", max_len=70)
    planned = plan_caches({"tiny": asked}, {"tiny": folder}, max_running)["tiny"]
    loaded = load_member("tiny", planned, folder, load_vocabulary("tiny", planned))
    assert loaded.page_size == PAGE_SIZES["cpu"] == 16
    assert loaded.num_pages == max_running * 5
    assert planned.cache_bytes == sum(loaded._cache.num_bytes().values())


def test_pages_that_hold_no_sequence_are_refused(tiny_checkpoints: dict[Kind, Path]) -> None:
    """85 pages of 12 KiB are a MiB less a bit; one of them is scratch."""
    folder = tiny_checkpoints["llama"]
    asked = member(folder, kv_cache="paged", kv_memory="1MiB", max_len=512)
    vocabulary = load_vocabulary("tiny", asked)
    assert load_member("tiny", asked, folder, vocabulary).num_pages == 2**20 // (16 * 768) - 1
    smaller = asked.model_copy(update={"kv_memory": 33 * 16 * 768 - 1})
    with pytest.raises(
        ConfigError, match=rf"kv_memory: .* needs {33 * 16 * 768}; raise kv_memory or lower max_len"
    ):
        load_member("tiny", smaller, folder, vocabulary)


@pytest.mark.parametrize(
    ("asked", "device", "size"),
    [
        ("auto", "cpu", None),
        ("auto", "cuda:0", 256),
        ("rows", "cuda:0", None),
        ("rows", "cpu", None),
        ("paged", "cpu", 16),
        ("paged", "cuda:1", 256),
    ],
)
def test_which_members_have_pages(asked: str, device: str, size: int | None) -> None:
    config = MemberConfig.model_validate({"model": "m", "kv_cache": asked})
    assert page_size(config, torch.device(device)) == size

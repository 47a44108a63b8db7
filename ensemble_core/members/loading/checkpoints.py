"""Where a member's files are, and its tokenizer and vocabulary read from them.

A member's model is a local folder, `demo:NAME`, or a hub id. The hub is used as transformers has it: its
cache, `HF_HOME`, `HF_HUB_OFFLINE`, the user's token. A server starts from what is cached and downloads only
what is not; `pull` asks the hub for news.

Invariant: a folder handed out holds safetensors weights, whole; pickled weights are never read. It does not
load weights, place models, or know templates.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import AutoConfig, AutoTokenizer

from ensemble_core.config import Config
from ensemble_core.errors import CheckpointError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading import demo_models
from ensemble_core.text.vocabulary import Vocabulary, from_tokenizer

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
# Copies of the weights in other layouts, which transformers does not read.
_UNWANTED = ["*/*", "consolidated*"]
_REVISIONS = {"model": "revision", "adapter": "adapter_revision"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class _Source:
    """What is asked of the hub. field: that names it in the configuration. code: whether its Python files are."""

    id: str
    revision: str | None
    code: bool = False
    field: Literal["model", "adapter"] = "model"

    @property
    def said(self) -> str:
        """As messages name it."""
        return f"{self.field} {self.id!r}"


def _model_of(member: MemberConfig) -> _Source:
    return _Source(member.model, member.revision, member.trust_remote_code)


def resolve_folder(member: MemberConfig) -> Path:
    """The folder with a member's config, tokenizer and safetensors weights.

    Raises CheckpointError, with what to do, where the files are missing, incomplete, pickled, or cannot be
    fetched.
    """
    if member.model.startswith(demo_models.PREFIX):
        return _demo_folder(member.model)
    if (local := Path(member.model)).is_dir():
        return _checked(local, member.model)
    if local.is_absolute():
        raise CheckpointError(f"model {member.model!r}: no such folder; correct the path in the configuration")
    cached = _cached_snapshot(member)
    return cached if cached is not None else _download(member)


def resolve_adapter(member: MemberConfig) -> Path:
    """The folder with a member's adapter: its config and safetensors weights. Raises CheckpointError."""
    assert member.adapter is not None, "the member has no adapter"
    source = _Source(member.adapter, member.adapter_revision, field="adapter")
    if (local := Path(source.id)).is_dir():
        return _checked_adapter(local, source)
    if local.is_absolute():
        raise CheckpointError(f"{source.said}: no such folder; correct the path in the configuration")
    try:
        return _checked_adapter(_snapshot(source, local_files_only=True), source)
    except (OSError, ValueError, CheckpointError):
        return _checked_adapter(_fetched(source, weights=True), source)


def pull(config: Config) -> list[tuple[str, Path]]:
    """Fetch every member's files; member -> folder in the order of the configuration, of an adapter its own.

    Demo models are downloaded and converted once; hub models are brought up to their revision. Raises
    CheckpointError.
    """
    return [(name, _pull_member(member)) for name, member in config.members.items()]


def load_tokenizer(name: str, member: MemberConfig) -> Any:
    """The member's transformers tokenizer, an adapter's its base's; shared between callers, so not to be changed.

    Raises CheckpointError where the folder has none that can be read.
    """
    return _tokenizer(member.base or name, _spoken_folder(member), member.trust_remote_code)


def load_vocabulary(name: str, member: MemberConfig) -> Vocabulary:
    """The member's vocabulary, as large as its model's embedding table; an adapter's is its base's, one object.

    Stop ids are those of the generation config, the config and the tokenizer together. Raises CheckpointError
    for files that cannot be read, UnsupportedModelError for a tokenizer that cannot work.
    """
    return _vocabulary(member.base or name, _spoken_folder(member), member.trust_remote_code)


def _spoken_folder(member: MemberConfig) -> Path:
    """The folder with a member's config and tokenizer; where its weights are elsewhere, without them."""
    if member.host is None or member.model.startswith(demo_models.PREFIX):
        return resolve_folder(member)
    if (local := Path(member.model)).is_dir() and (local / "config.json").is_file():
        return local
    if local.is_absolute() or local.is_dir():
        return resolve_folder(member)
    try:
        return _snapshot(_model_of(member), local_files_only=True, weights=False)
    except (OSError, ValueError):
        return _fetched(_model_of(member), weights=False)


def _pull_member(member: MemberConfig) -> Path:
    if member.adapter is not None:
        return _pull_adapter(member, member.adapter)
    if member.model.startswith(demo_models.PREFIX):
        return demo_models.fetch(demo_models.demo_model(member.model))
    if Path(member.model).is_dir() or Path(member.model).is_absolute():
        return resolve_folder(member)
    if huggingface_hub.constants.is_offline_mode():
        return resolve_folder(member) if member.host is None else _spoken_folder(member)
    return _download(member) if member.host is None else _fetched(_model_of(member), weights=False)


def _pull_adapter(member: MemberConfig, adapter: str) -> Path:
    if Path(adapter).is_dir() or Path(adapter).is_absolute() or huggingface_hub.constants.is_offline_mode():
        return resolve_adapter(member)
    source = _Source(adapter, member.adapter_revision, field="adapter")
    return _checked_adapter(_fetched(source, weights=True), source)


def _demo_folder(reference: str) -> Path:
    model = demo_models.demo_model(reference)
    if not demo_models.is_fetched(model):
        raise CheckpointError(
            f"model {reference!r}: not fetched yet (looked in {demo_models.folder(model)}); run "
            "`unisono pull --config FILE` with this configuration"
        )
    return demo_models.folder(model)


def _checked(folder: Path, model: str) -> Path:
    """The folder, if its config and its safetensors weights are there and whole."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"model {model!r}: {folder} has no config.json; name a model's own folder")
    if not any(folder.glob("*.safetensors")):
        found = sorted(file.name for file in folder.glob("*.bin")) + sorted(
            file.name for file in folder.glob("*.pt*")
        )
        raise CheckpointError(
            f"model {model!r}: {folder} has no *.safetensors file"
            + (f" (found {', '.join(found)}; pickled weights are never read)" if found else "")
            + "; save the model with save_pretrained or name a revision that has safetensors"
        )
    if missing := _missing_shards(folder):
        raise CheckpointError(
            f"model {model!r}: {folder} lacks {', '.join(missing)}, which {_INDEX} lists; fetch it again"
        )
    return folder


def _checked_adapter(folder: Path, source: _Source) -> Path:
    """The folder, if it holds an adapter."""
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            pickled = " (found adapter_model.bin; pickled weights are never read)"
            found = pickled if (folder / "adapter_model.bin").is_file() else ""
            raise CheckpointError(
                f"{source.said}: {folder} has no {file}{found}; name a folder that PEFT's save_pretrained has written"
            )
    return folder


def _missing_shards(folder: Path) -> list[str]:
    if not (folder / _INDEX).is_file():
        return []
    shards = set(read_json(folder / _INDEX)["weight_map"].values())
    return sorted(shard for shard in shards if not (folder / shard).is_file())


def _cached_snapshot(member: MemberConfig) -> Path | None:
    """What the hub's cache holds of the revision; None if that is nothing, or a broken-off download."""
    try:
        return _checked(_snapshot(_model_of(member), local_files_only=True), member.model)
    except (OSError, ValueError, CheckpointError):
        return None


def _download(member: MemberConfig) -> Path:
    return _checked(_fetched(_model_of(member), weights=True), member.model)


def _fetched(source: _Source, weights: bool) -> Path:
    logger.info("%s: asking the hub for revision %s", source.id, source.revision or "main")
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return _snapshot(source, local_files_only=False, weights=weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source.said}: {_advice(source, error)}") from error


def _snapshot(source: _Source, local_files_only: bool, weights: bool = True) -> Path:
    wanted = _WANTED if weights else [pattern for pattern in _WANTED if pattern != _WEIGHTS]
    return Path(
        huggingface_hub.snapshot_download(
            source.id,
            revision=source.revision,
            allow_patterns=[*wanted, "*.py"] if source.code else wanted,
            ignore_patterns=_UNWANTED,
            local_files_only=local_files_only,
        )
    )


def _advice(source: _Source, error: Exception) -> str:
    """What went wrong with the hub, and what to do."""
    if isinstance(error, GatedRepoError):
        return "the hub wants its licence accepted on the model's page, and a token: `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no revision {source.revision!r} of it; correct `{_REVISIONS[source.field]}`"
    if isinstance(error, RepositoryNotFoundError):
        return f"neither a folder nor a model on the hub; correct `{source.field}`, or log in if it is private"
    if isinstance(error, HFValidationError):
        return f"neither a folder nor a hub id ({error}); correct `{source.field}`"
    if huggingface_hub.constants.is_offline_mode():
        return "not in the hub's cache, and HF_HUB_OFFLINE forbids to download; run `unisono pull` online"
    return f"not in the hub's cache, and the download failed ({error}); check the network, or name a folder"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. Raises CheckpointError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the model again") from error


def _read(name: str, folder: Path, what: str, load: Callable[[], Any]) -> Any:
    """Run one of transformers' loaders; its errors, which are of many kinds, become one."""
    try:
        return load()
    except Exception as error:
        raise CheckpointError(f"member {name!r}: {what} in {folder} cannot be loaded: {error}") from error


@lru_cache(maxsize=16)
def _tokenizer(name: str, folder: Path, trust_remote_code: bool) -> Any:
    return _read(
        name,
        folder,
        "the tokenizer",
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code),
    )


@lru_cache(maxsize=16)
def _vocabulary(name: str, folder: Path, trust_remote_code: bool) -> Vocabulary:
    tokenizer = _tokenizer(name, folder, trust_remote_code)
    config = _read(
        name,
        folder,
        "the config",
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config(),
    )
    stop_ids = _stop_ids(folder, config.eos_token_id, tokenizer.eos_token_id)
    return from_tokenizer(tokenizer, config.vocab_size, stop_ids, name)


def _stop_ids(folder: Path, *declared: int | list[int] | None) -> set[int]:
    """The union of what generation config, config and tokenizer declare; each an id, a list, or nothing."""
    path = folder / "generation_config.json"
    generation = read_json(path).get("eos_token_id") if path.is_file() else None
    found: set[int] = set()
    for ids in (generation, *declared):
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return found

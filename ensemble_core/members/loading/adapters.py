"""LoRA adapters in PEFT's format: read, refused by name where they cannot be served, put on a base's weights.

An adapter goes on a copy of the base's modules that holds the same weights and no copies of them; PEFT puts its own
layers around them, and that is the model which a member is proved against. Served is what these layers compute for
plain LoRA on linear layers: ranks and alphas by module, rank-stabilised scaling. What changes tokens, embeddings or
the head is refused, since an adapter speaks with its base's vocabulary and transfer matrices.

Does not know bodies, caches or schedules. PEFT is imported here alone (unisono[lora]).
"""

from __future__ import annotations

import copy
import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ensemble_core.errors import CheckpointError, ConfigError, UnsupportedModelError, quoted
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.body.low_rank import LowRank
from ensemble_core.members.loading.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    load_tokenizer,
    read_json,
    resolve_adapter,
)

logger = logging.getLogger(__name__)

_ACTIVE = "default"  # PEFT's name of the only adapter of a model
_SERVED = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
}
_OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "runtime_config",
}  # fields that change nothing of what a trained adapter computes
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of training that leave the base's weights alone
_TASKS = (None, "CAUSAL_LM")
_LONGEST = 300  # characters of a library's message, which lists every tensor that does not fit
_TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_[AB]\.weight")
_ADVICE = (
    "served is plain LoRA on linear layers inside a model; merge the adapter into its base with PEFT's "
    "merge_and_unload, and name the merged folder as `model`"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's files, which were found to be of a kind that is served. member: that it becomes."""

    member: str
    folder: Path
    config: Any  # peft.LoraConfig


def read_adapter(name: str, member: MemberConfig) -> Adapter:
    """A member's adapter, without its weights.

    Raises CheckpointError for files that cannot be read, UnsupportedModelError, by name, for what is not served,
    ConfigError where PEFT is not installed.
    """
    peft, folder = _peft(name), resolve_adapter(member)
    settings = read_json(folder / ADAPTER_CONFIG)
    _refuse_settings(name, settings, peft.LoraConfig)
    _refuse_tensors(name, folder / ADAPTER_WEIGHTS)
    _refuse_tokens(name, folder, load_tokenizer(name, member))
    known = {field.name for field in fields(peft.LoraConfig)}
    try:
        config = peft.LoraConfig(**{key: value for key, value in settings.items() if key in known & _SERVED})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"member {name!r}: {folder / ADAPTER_CONFIG}: {error}") from error
    config.inference_mode, config.init_lora_weights = True, False
    logger.info(
        "%s: adapter of rank %s on %s", name, config.r, settings.get("base_model_name_or_path") or "its base"
    )
    return Adapter(name, folder, config)


def adapt(adapter: Adapter, model: Any) -> Any:
    """A model of the base's own weights with the adapter's layers in it; `model` stays as it is.

    Raises CheckpointError where the adapter does not fit, UnsupportedModelError where it changes what it must not.
    """
    peft, where = _peft(adapter.member), f"member {adapter.member!r}: adapter {adapter.folder}"
    own = _sharing(model)
    try:
        peft.inject_adapter_in_model(adapter.config, own, _ACTIVE)
        _refuse_layers(where, own)
        found = peft.set_peft_model_state_dict(own, load_file(adapter.folder / ADAPTER_WEIGHTS), _ACTIVE)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())[:_LONGEST]
        raise CheckpointError(
            f"{where} cannot be put on its base: {why}; name the base that it was made for"
        ) from error
    lacking = [name for name in found.missing_keys if "lora_" in name]
    if lacking or found.unexpected_keys:
        raise CheckpointError(
            f"{where} does not fit its base: without weights are {quoted(lacking[:3])}, without a place "
            f"{quoted(found.unexpected_keys[:3])}; name the base that it was made for"
        )
    return own.eval().requires_grad_(False)


def low_ranks(model: Any) -> dict[str, LowRank]:
    """What the adapter of an adapted model adds, by the path of the projection."""
    found = {}
    for path, layer in _adapted_layers(model).items():
        down, up = layer.lora_A[_ACTIVE].weight, layer.lora_B[_ACTIVE].weight
        found[path] = LowRank(down.detach(), (up.detach().float() * layer.scaling[_ACTIVE]).to(up.dtype))
    return found


def _peft(name: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"members.{name}.adapter needs the extra unisono[lora]; run `pip install 'unisono[lora]'`"
        ) from error


def _sharing(model: Any) -> Any:
    """A copy of a model's modules around the same parameters and buffers."""
    same = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, same)


def _adapted_layers(model: Any) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}


def _refuse_settings(name: str, settings: Mapping[str, Any], defaults: Any) -> None:
    """Raise UnsupportedModelError for settings that make it another thing than plain LoRA."""
    if (kind := settings.get("peft_type")) != "LORA":
        raise UnsupportedModelError(f"member {name!r}: its adapter is of kind {quoted(kind)}; {_ADVICE}")
    usual = {field.name: field.default for field in fields(defaults)}
    known = {"peft_type", "task_type", "init_lora_weights", *_SERVED, *_OF_TRAINING}
    odd = {key: value for key, value in settings.items() if key not in known and value and value != usual.get(key)}
    if (start := settings.get("init_lora_weights")) not in _STARTS:
        odd["init_lora_weights"] = start
    if (task := settings.get("task_type")) not in _TASKS:
        odd["task_type"] = task
    if odd:
        listed = ", ".join(f"{key}: {quoted(value)}" for key, value in sorted(odd.items()))
        raise UnsupportedModelError(f"member {name!r}: its adapter has {listed}, which is not served; {_ADVICE}")


def _refuse_tensors(name: str, file: Path) -> None:
    """Raise UnsupportedModelError for weights of anything but linear layers' low-rank parts."""
    try:
        with safe_open(file, "pt") as weights:
            keys = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); fetch it again") from error
    if odd := sorted(key for key in keys if not _TENSOR.fullmatch(key)):
        raise UnsupportedModelError(
            f"member {name!r}: its adapter has weights that are not served: {quoted(odd[:3])}"
            f"{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}; {_ADVICE}"
        )
    if not keys:
        raise CheckpointError(f"{file}: holds no weights; fetch it again")


def _refuse_tokens(name: str, folder: Path, tokenizer: Any) -> None:
    """Raise UnsupportedModelError where the adapter's folder brings tokens that the base does not have."""
    known = tokenizer.get_vocab()
    try:
        added = _added_tokens(folder)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its tokenizer's files cannot be read ({error!r}); fetch it again"
        ) from error
    if odd := sorted(token for token, token_id in added.items() if known.get(token) != token_id):
        raise UnsupportedModelError(
            f"member {name!r}: its adapter adds tokens, which its base lacks or has elsewhere: {quoted(odd[:5])}; "
            f"{_ADVICE}"
        )
    template = folder / "chat_template.jinja"
    if template.is_file() and template.read_text(encoding="utf-8") != tokenizer.chat_template:
        logger.warning("%s: chats go by the template of its base; `chat_template: %s` is its own", name, template)


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens beside a vocabulary that tokenizer files in a folder list, in any of their forms."""
    found: dict[str, int] = {}
    if (file := folder / "added_tokens.json").is_file():
        found |= read_json(file)
    if (file := folder / "tokenizer_config.json").is_file():
        listed = read_json(file).get("added_tokens_decoder") or {}
        found |= {token["content"]: int(token_id) for token_id, token in listed.items()}
    if (file := folder / "tokenizer.json").is_file():
        found |= {token["content"]: token["id"] for token in read_json(file).get("added_tokens") or ()}
    return found


def _refuse_layers(where: str, model: Any) -> None:
    """Raise UnsupportedModelError where the adapter is on embeddings, the head, or layers that are not linear."""
    outer = [model.get_input_embeddings(), model.get_output_embeddings()]
    layers = _adapted_layers(model)
    odd = [
        path
        for path, layer in layers.items()
        if layer in outer or type(layer.base_layer) not in (nn.Linear, Conv1D)
    ]
    if odd:
        raise UnsupportedModelError(f"{where} changes {quoted(odd[:3])}, which is not served; {_ADVICE}")

"""What `unisono fit` has learnt of a council, as files: safetensors for numbers, JSON for what they belong to.

Invariant: an artefact is only used for the models, features and kind of council that it was learnt for; anything else
is refused with the reason. Never pickle. Does not know how anything is learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ensemble_core.config import Config, WeightingConfig
from ensemble_core.council_config import RouteConfig
from ensemble_core.councils.features import NUM_FEATURES, VERSION
from ensemble_core.councils.routers import ClusterRouter, LinearRouter, Router
from ensemble_core.errors import ArtefactError
from ensemble_core.identity import digest, weights_of

_NUMBERS, _ABOUT = "router.safetensors", "about.json"


@dataclass(frozen=True, slots=True)
class About:
    """What an artefact belongs to. models: name -> fingerprint, in the order of the columns; data: task -> sha256."""

    by: str
    models: Mapping[str, str]
    data: Mapping[str, str]
    features: str = VERSION
    options: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


def fingerprints(config: Config, models: Sequence[str]) -> dict[str, str]:
    """Model -> a digest of what its texts depend on; where it runs and how much memory it has do not count."""
    return {model: digest(_identity(config, model)) for model in models}


def _identity(config: Config, model: str) -> Any:
    if model in config.members:
        member = config.members[model]
        base, revision, *adapter = weights_of(member)
        return [base, revision, member.chat_template, *adapter]
    if model in config.ensembles:
        recipe = config.ensembles[model]
        own = recipe.model_dump(mode="json", include={"main", "fusion"})
        own["weighting"] = _weighting(recipe.weighting)
        return [own, {name: [weight, _identity(config, name)] for name, weight in recipe.weights.items()}]
    council = config.councils[model]
    own = council.model_dump(mode="json", exclude={"limits", "artefact", "examples"})
    return [own, {name: _identity(config, name) for name in council.called}]


def _weighting(weighting: WeightingConfig) -> dict[str, Any]:
    """As configured, with a gate's digest in place of its path."""
    own = weighting.model_dump(mode="json", exclude={"artefact"})
    path = weighting.artefact
    return own if path is None else own | {"artefact": _sha256(path) if path.exists() else ""}


def save_router(folder: Path, router: LinearRouter | ClusterRouter, about: About) -> None:
    """Write the files, over older ones. The numbers come first, so half of a save is refused and not misread."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {name: value.contiguous() for name, value in _tensors(router).items()}
    (folder / _ABOUT).unlink(missing_ok=True)
    save_file(numbers, folder / _NUMBERS)
    text = json.dumps(asdict(about) | {"numbers": _sha256(folder / _NUMBERS)}, indent=2)
    (folder / _ABOUT).write_text(text + "\n", encoding="utf-8")


def _tensors(router: LinearRouter | ClusterRouter) -> dict[str, Tensor]:
    preferred = {} if router.preference is None else {"preference": router.preference}
    if isinstance(router, LinearRouter):
        return {"weights": router.weights, "bias": router.bias} | preferred
    return {"centres": router.centres, "accuracy": router.accuracy} | preferred


def load_router(name: str, council: RouteConfig, config: Config) -> Router:
    """The router of a council. Raises ArtefactError that says what does not fit."""
    assert council.artefact is not None
    where = f"ensembles.{name}.artefact: {council.artefact}"
    again = f"run `unisono fit --council {name}` again"
    raw, numbers = _read(council.artefact, where, again)
    models = fingerprints(config, council.models)
    if raw["by"] != council.by:
        raise ArtefactError(f"{where} was fitted for by: {raw['by']}, not {council.by}; {again}")
    if raw["features"] != VERSION:
        raise ArtefactError(f"{where} has features {raw['features']}, not {VERSION}; {again}")
    if list(raw["models"]) != list(models):
        raise ArtefactError(f"{where} was fitted for {list(raw['models'])}, not {list(models)}; {again}")
    if changed := [model for model, digest in models.items() if raw["models"][model] != digest]:
        raise ArtefactError(f"{where} was fitted for other versions of {changed}; {again}")
    return _router(raw, numbers, len(models), where)


def _read(folder: Path, where: str, again: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        raw = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if raw["numbers"] != _sha256(folder / _NUMBERS):
            raise ArtefactError(f"{where}: {_NUMBERS} is not the one that {_ABOUT} describes; {again}")
        missing = {"by", "features", "models", "options"} - raw.keys()
        if missing or not isinstance(raw["models"], dict):
            raise ArtefactError(f"{where}: {_ABOUT} lacks {sorted(missing)}; {again}")
        return raw, load_file(folder / _NUMBERS)
    except FileNotFoundError as error:
        raise ArtefactError(f"{where}: {error.filename} is missing; {again}") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtefactError(f"{where} cannot be read: {error}; {again}") from error


def _router(raw: Mapping[str, Any], numbers: Mapping[str, Tensor], count: int, where: str) -> Router:
    shapes: dict[str, tuple[int, ...]]
    if raw["by"] == "linear":
        shapes = {"weights": (NUM_FEATURES, count), "bias": (count,)}
    else:
        num = len(numbers["centres"]) if "centres" in numbers else 0
        shapes = {"centres": (num, NUM_FEATURES), "accuracy": (num, count)}
    if "preference" in numbers:
        shapes["preference"] = (count,)
    for name, shape in shapes.items():
        if name not in numbers or tuple(numbers[name].shape) != shape or not torch.isfinite(numbers[name]).all():
            raise ArtefactError(f"{where}: {name} must be finite numbers of shape {shape}")
    own = {name: numbers[name].to(torch.float32) for name in shapes}
    if raw["by"] == "linear":
        return LinearRouter(**own)
    options = raw["options"]
    return ClusterRouter(**own, near=int(options["near"]), beta=float(options["beta"]))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

"""Gates on disk: safetensors, and the checks made before one is used.

Invariant: a gate is used with the members, main, weights, fusion and evidence that it was learnt for; anything else
is refused with what differs. Files are written atomically. Does not know how a gate is learnt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ensemble_core.config import Config
from ensemble_core.errors import ArtefactError
from ensemble_core.fusion.base import FUSIONS, FusionSpace
from ensemble_core.fusion.evidence import NAMES, VERSION
from ensemble_core.fusion.gate import GateNumbers, WeightGate
from ensemble_core.identity import digest, weights_of

FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True)
class GateOrigin:
    """What a gate belongs to. members: name -> fingerprint, main first. weights: name -> as configured."""

    members: Mapping[str, str]
    weights: Mapping[str, float]
    fusion: Mapping[str, Any]
    evidence: str = VERSION
    format_version: str = FORMAT_VERSION

    @classmethod
    def of(cls, config: Config, ensemble: str, space: FusionSpace) -> GateOrigin:
        """Of a configured ensemble. space: of all its members, main first."""
        recipe = config.ensembles[ensemble]
        pairs = zip(space.members, space.vocabularies, strict=True)
        options = FUSIONS.parse(recipe.fusion.name, recipe.fusion.options, f"ensembles.{ensemble}.fusion")
        return cls(
            {name: digest([weights_of(config.members[name]), v.fingerprint]) for name, v in pairs},
            {name: round(recipe.weights[name], 6) for name in space.members},
            {"name": recipe.fusion.name, "options": options.model_dump(mode="json")},
        )


def save_gate(
    path: Path, numbers: GateNumbers, origin: GateOrigin, data: Mapping[str, str], report: Mapping[str, Any]
) -> None:
    """Write a gate. data: task -> sha256; report: what it is worth. Raises ArtefactError."""
    tensors = {each.name: getattr(numbers, each.name).contiguous() for each in fields(numbers)}
    about = {name: json.dumps(value) for name, value in asdict(origin).items()}
    about |= {"data": json.dumps(dict(data)), "report": json.dumps(dict(report)), "sha256": _sha256(tensors)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(tensors, metadata=about))
        partial.replace(path)
    except OSError as error:
        raise ArtefactError(f"{path}: the gate cannot be written ({error.strerror}); pass --out FILE") from error
    finally:
        partial.unlink(missing_ok=True)


def load_gate(path: Path, config: Config, ensemble: str, space: FusionSpace) -> WeightGate:
    """The gate of an ensemble over all its members, main first. Raises ArtefactError that says what does not fit."""
    where = f"ensembles.{ensemble}.weighting.artefact: {path}"
    again = f"run `unisono tune --ensemble {ensemble} --method gate --write` again, or set weighting: fixed"
    about, tensors = _read(path, where, again)
    for name, expected in asdict(GateOrigin.of(config, ensemble, space)).items():
        found = about.get(name)
        if found != json.loads(json.dumps(expected)) or (name == "members" and list(found) != list(expected)):
            raise ArtefactError(f"{where}: {_unlike(name, expected, found)}; {again}")
    if about.get("sha256") != _sha256(tensors):
        raise ArtefactError(f"{where}: sha256: the numbers are not those that were written; {again}")
    return WeightGate.over(space, _numbers(tensors, len(space.members), f"{where}: %s; {again}"))


def _unlike(name: str, expected: Any, found: Any) -> str:
    """What differs, in words."""
    if name != "members" or not isinstance(found, dict):
        return f"{name}: expected {expected}, found {found}"
    if list(found) != list(expected):
        return f"members: it was learnt for {list(found)} (main first), not for {list(expected)}"
    changed = [member for member, mark in expected.items() if found[member] != mark]
    return f"members: it was learnt for other checkpoints or tokenizers of {changed}"


def _read(path: Path, where: str, again: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ArtefactError(f"{where}: expected a file, found none; {again}")
    try:
        with safe_open(path, framework="pt") as reader:
            raw: dict[str, str] = reader.metadata() or {}
            about = {name: value if name == "sha256" else json.loads(value) for name, value in raw.items()}
            return about, {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtefactError(f"{where}: cannot be read ({error}); {again}") from error


def _numbers(tensors: Mapping[str, Tensor], num: int, refusal: str) -> GateNumbers:
    hidden = tensors["shift"].shape[-1] if "shift" in tensors else 0
    wide, inner = (num, len(NAMES)), (num, len(NAMES), hidden)
    shapes = {"mean": wide, "spread": wide, "inner": inner, "shift": (num, hidden), "outer": (num, hidden)}
    for name, shape in (shapes | {"bias": (num,)}).items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or not bool(found.isfinite().all()):
            raise ArtefactError(refusal % f"{name}: expected finite numbers of shape {shape}")
    if not bool((tensors["spread"] > 0).all()):
        raise ArtefactError(refusal % "spread: expected numbers greater than 0")
    return GateNumbers(**{each.name: tensors[each.name].float() for each in fields(GateNumbers)})


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].to(torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()

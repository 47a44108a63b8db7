"""Writing an ensemble's weights into its YAML file, and nothing else of it.

The numbers are replaced in the text where they stand, so comments, order and layout stay as they are. Invariants: the
file is replaced at once, whole; what is written reads back as the weights meant, with everything else as before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ensemble_core.errors import EvaluationError


def write_weights(path: Path, ensemble: str, weights: Mapping[str, float]) -> None:
    """Set `ensembles.NAME.members` of a configuration file. Raises EvaluationError where that cannot be done."""
    try:
        text = path.read_text(encoding="utf-8")
        changed = replaced(text, ensemble, weights)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(changed, encoding="utf-8")
        shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(f"{path}: the weights cannot be written ({error.strerror})") from error


def replaced(text: str, ensemble: str, weights: Mapping[str, float]) -> str:
    """The text of a configuration with other weights. Raises EvaluationError."""
    members = _at(yaml.compose(text), ("ensembles", ensemble, "members"))
    before = yaml.safe_load(text)
    spans = []
    for name, weight in weights.items():
        node = _at(members, (name,), f"ensembles.{ensemble}.members.")
        spans.append((node.start_mark.index, node.end_mark.index, f"{weight:g}"))
    for start, end, number in sorted(spans, reverse=True):
        text = text[:start] + number + text[end:]
    if yaml.safe_load(text) != _meant(before, ensemble, weights):
        raise EvaluationError(
            f"ensembles.{ensemble}.members: the file cannot be changed there alone (others share the weights by an "
            "alias); write them by hand"
        )
    return text


def _meant(before: dict[str, Any], ensemble: str, weights: Mapping[str, float]) -> dict[str, Any]:
    """The configuration as it should read; nothing that an alias shares is changed in it."""
    own = before["ensembles"][ensemble]
    members = own["members"] | {name: float(f"{weight:g}") for name, weight in weights.items()}
    return before | {"ensembles": before["ensembles"] | {ensemble: own | {"members": members}}}


def _at(node: yaml.Node | None, path: tuple[str, ...], prefix: str = "") -> yaml.Node:
    """The node under a path of keys; not one that is written elsewhere (an alias), which others may share."""
    for depth, key in enumerate(path):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        where = prefix + ".".join(path[: depth + 1])
        found: list[tuple[Any, Any]] = [(name, value) for name, value in pairs if name.value == key]
        if not found:
            raise EvaluationError(f"{where}: not found in the file, so its weights cannot be written")
        name, node = found[-1]
        if node.start_mark.index < name.end_mark.index:
            raise EvaluationError(f"{where}: is an alias; write its weights by hand, where its anchor stands")
    assert node is not None
    return node

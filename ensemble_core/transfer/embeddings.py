"""The input embeddings of a model folder, without the rest of the model.

Reads that one tensor from safetensors, single or sharded. Does not know architectures: it finds the tensor by
the names that they commonly use.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ensemble_core.errors import CheckpointError

# Name endings, in order of preference.
_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "embedding.weight",
    "embeddings.weight",
)


def load_embeddings(folder: Path) -> Tensor:
    """The input embeddings (V, d) of the model in `folder`, in the checkpoint's dtype, on the CPU.

    Raises CheckpointError if there are no safetensors, if they are damaged, or if no tensor (or more than one)
    has the name of an embedding; the message lists what was found.
    """
    files = _files_by_tensor(folder)
    name = _embedding_name(sorted(files), folder)
    with _open(files[name]) as reader:
        tensor: Tensor = reader.get_tensor(name)
    return tensor


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in shards.items()}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _open(path) as reader:
            files |= dict.fromkeys(reader.keys(), path)
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file found; no other format is supported")
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); download it again") from error


def _embedding_name(names: list[str], folder: Path) -> str:
    for wanted in _NAMES:
        found = [name for name in names if f".{name}".endswith(f".{wanted}")]
        found = [name for name in found if "language_model" in name] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise CheckpointError(f"{folder}: several tensors could be the input embeddings: {found}")
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise CheckpointError(
        f"{folder}: no tensor has the name of input embeddings (known endings: {', '.join(_NAMES)}); "
        f"found {len(names)} tensors: {listed}"
    )

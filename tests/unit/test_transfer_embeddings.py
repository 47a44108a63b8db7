import json

import pytest
import torch
from safetensors.torch import save_file

from ensemble_core.errors import CheckpointError
from ensemble_core.transfer.embeddings import load_embeddings

TABLE = torch.arange(12.0).reshape(4, 3).bfloat16()
OTHER = torch.ones(4, 3)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "wte.weight",
        "model.language_model.embed_tokens.weight",
        "gpt_neox.embed_in.weight",
    ],
)
def test_finds_the_tensor_in_a_single_file(tmp_path, name):
    save_file({name: TABLE, "lm_head.weight": OTHER, "wpe.weight": OTHER.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(load_embeddings(tmp_path), TABLE)


def test_finds_the_shard(tmp_path):
    shards = {"a.safetensors": {"lm_head.weight": OTHER}, "b.safetensors": {"model.embed_tokens.weight": TABLE}}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(load_embeddings(tmp_path), TABLE)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read"):
        load_embeddings(tmp_path)


def test_prefers_the_language_model_of_several(tmp_path):
    names = {"audio.embed_tokens.weight": OTHER, "model.language_model.embed_tokens.weight": TABLE}
    save_file(names, tmp_path / "model.safetensors")
    assert torch.equal(load_embeddings(tmp_path), TABLE)


def test_refuses_with_what_was_found(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load_embeddings(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"x.weight": OTHER, "y.embed_tokens_per_layer.weight": OTHER.clone()}, path)
    with pytest.raises(CheckpointError, match=r"found 2 tensors: x\.weight, y\.embed_tokens_per_layer\.weight"):
        load_embeddings(tmp_path)
    save_file({"a.embed_tokens.weight": OTHER, "b.embed_tokens.weight": TABLE}, path)
    with pytest.raises(CheckpointError, match=r"several.*a\.embed_tokens\.weight.*b\.embed_tokens\.weight"):
        load_embeddings(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_embeddings(tmp_path)

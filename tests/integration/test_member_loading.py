"""What can be a member and what cannot: surveyed, proved and placed at load, refused by name with the reason."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import KINDS, VOCAB_SIZES, Kind
from torch import nn

from ensemble_core.errors import CheckpointError, ConfigError, UnisonoError, UnsupportedModelError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.attention import rows as attention
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body.flat import FlatBody
from ensemble_core.members.body.transformers import TransformersBody
from ensemble_core.members.loading.checkpoints import resolve_folder
from ensemble_core.members.loading.models import load_member, make_member
from ensemble_core.members.loading.proof import attention_layers
from ensemble_core.members.local import LocalMember
from ensemble_core.text.vocabulary import Vocabulary

SIZE = 64
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_theta": 10_000.0, "factor": 2.0}


def letters(size: int = SIZE) -> Vocabulary:
    tokens = [b"%d" % token_id for token_id in range(size)]
    return Vocabulary(tokens, frozenset({0, 1, 2}), frozenset({2}), encode=lambda text: [])


def config_of(folder: Path, **options: Any) -> MemberConfig:
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": "1MiB", "max_len": 64} | options
    return MemberConfig(model=str(folder), **settings)


def load(folder: Path, size: int = SIZE, **options: Any) -> LocalMember:
    return load_member("tiny", config_of(folder, **options), folder, letters(size))


def saved(folder: Path, config: Any) -> Path:
    """A tiny random model of any kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, config.architectures[0])(config)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def llama(**options: Any) -> Any:
    return transformers.LlamaConfig(**SHAPE | {"architectures": ["LlamaForCausalLM"]} | options)


def gemma2() -> Any:
    return transformers.Gemma2Config(
        **SHAPE, architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=5.0, sliding_window=8
    )


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **SHAPE,
        architectures=["GptOssForCausalLM"],
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=SIZE,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        architectures=["T5ForConditionalGeneration"],
    )


def mamba() -> Any:
    return transformers.MambaConfig(
        vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, state_size=4, architectures=["MambaForCausalLM"]
    )


def rwkv() -> Any:
    return transformers.RwkvConfig(
        vocab_size=SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        attention_hidden_size=16,
        architectures=["RwkvForCausalLM"],
    )


def linear_attention() -> Any:
    return transformers.Qwen3NextConfig(
        **SHAPE,
        architectures=["Qwen3NextForCausalLM"],
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def dynamic_rope() -> Any:
    return llama(rope_parameters={"rope_type": "dynamic", **ROPE})


def long_rope() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    return llama(rope_parameters={"rope_type": "longrope", **ROPE, **factors})


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "encoder-decoder": (t5, "t5 is an encoder-decoder model"),
    "state space": (mamba, r"mamba has layers of kind \['linear_attention'\]; supported are"),
    "linear attention": (linear_attention, r"layers of kind \['linear_attention'\]; supported are"),
    "no attention interface": (rwkv, "does not support transformers' attention interface"),
    "dynamic rope": (dynamic_rope, "rotary embeddings of kind"),
    "long rope": (long_rope, "rotary embeddings of kind"),
    "softcap": (gemma2, r"Gemma2Attention needs \['softcap'\].*cannot be a member"),
    "sinks": (gpt_oss, r"GptOssAttention needs \['s_aux'\].*cannot be a member"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_cannot_work_is_refused(kind: str, tmp_path: Path) -> None:
    make, reason = UNSUPPORTED[kind]
    folder = saved(tmp_path, make())
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        load(folder)
    assert str(refusal.value).startswith("member 'tiny'")


def test_a_mixture_of_experts_is_fine(tmp_path: Path) -> None:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "architectures": ["MixtralForCausalLM"]}
    load(saved(tmp_path, transformers.MixtralConfig(**SHAPE, **options)))


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_ropes_without_state_are_fine(rope_type: str, tmp_path: Path) -> None:
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    parameters = {"rope_type": rope_type, **ROPE} | (extra if rope_type == "llama3" else {})
    load(saved(tmp_path, llama(rope_parameters=parameters)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "members.tiny.device: 'cuda:99' is not on this machine"),
        ({"device": "tpu"}, "members.tiny.device: 'tpu' is not supported; write auto, cpu or cuda:N"),
        ({"device": "meta"}, "members.tiny.device: 'meta' is not supported"),
        ({"kv_memory": "1MiB", "max_len": 100_000}, "members.tiny.kv_memory: 1048576 bytes hold no sequence"),
    ],
)
def test_a_place_that_cannot_be_had_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = saved(tmp_path, llama(max_position_embeddings=200_000))
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama())
    (folder / "model.safetensors").unlink()
    model = transformers.LlamaForCausalLM(llama())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        resolve_folder(config_of(folder))
    with pytest.raises(CheckpointError, match=r"member 'tiny': .* cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("content", ["{", '{"model_type": "no such model"}', None])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"member 'tiny': the config of .* cannot be read"):
        load(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="member 'tiny'"):
        load(folder)


def test_an_architecture_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, llama())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]}))
    with pytest.raises(UnisonoError, match="member 'tiny'"):
        load(folder)


def _spans_ignoring_the_window(spans: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, size: spans(self, None)


def _spans_wider_by_one(spans: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, size: spans(self, size and size + 1)


def _spans_narrower_by_one(spans: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, size: spans(self, size and size - 1)


def _spans_blind_to_the_cache(spans: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, size: attention.Spans(spans(self, size).end - 1, spans(self, size).end, 1)


def _spans_short_of_the_token(spans: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, size: attention.Spans(spans(self, size).begin, spans(self, size).end - 1, 1)


def _ignoring_the_window(window: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, group, size, device: window(self, group, None, device)


def _wider_by_one(window: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, group, size, device: window(self, group, size and size + 1, device)


def _narrower_by_one(window: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, group, size, device: window(self, group, size and size - 1, device)


def _blind_to_the_cache(window: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, group, size, device: window(self, group, group.num_new, device)


def _seeing_all(window: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, group, size, device: attention._Window(0, group.longest, None)


@pytest.mark.parametrize(
    "wrong", [_ignoring_the_window, _wider_by_one, _narrower_by_one, _blind_to_the_cache, _seeing_all]
)
def test_wrong_attention_is_caught(
    tiny_checkpoints: dict[Kind, Path], wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    patched = wrong(attention.PackedPass._window)
    monkeypatch.setattr(attention.PackedPass, "_window", patched)
    with pytest.raises(UnsupportedModelError, match="member 'tiny': Gemma3ForCausalLM answers differently"):
        load(tiny_checkpoints["gemma3"], size=640)


@pytest.mark.parametrize(
    "wrong",
    [
        _spans_ignoring_the_window,
        _spans_wider_by_one,
        _spans_narrower_by_one,
        _spans_blind_to_the_cache,
        _spans_short_of_the_token,
    ],
)
def test_wrong_spans_are_caught(
    tiny_checkpoints: dict[Kind, Path], wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.PackedPass, "spans", wrong(attention.PackedPass.spans))
    with pytest.raises(UnsupportedModelError, match="member 'tiny': Gemma3ForCausalLM answers differently"):
        load(tiny_checkpoints["gemma3"], size=640)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [_blind_to_the_cache, _seeing_all])
def test_wrong_attention_is_caught_in_every_architecture(
    tiny_checkpoints: dict[Kind, Path], kind: Kind, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.PackedPass, "_window", wrong(attention.PackedPass._window))
    with pytest.raises(UnsupportedModelError, match=r"member 'tiny': .* answers differently"):
        load(tiny_checkpoints[kind], size=VOCAB_SIZES[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_positions_off_by_one_are_caught(
    tiny_checkpoints: dict[Kind, Path], kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary positions are relative, so the second chunk alone is shifted against the first."""

    def shifted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, run: attention.PackedPass, *rest: Any) -> Any:
            run.positions += run.positions.min().clamp_max(1)
            return own(self, run, *rest)

        return call

    monkeypatch.setattr(FlatBody, "__call__", shifted(FlatBody.__call__))
    monkeypatch.setattr(TransformersBody, "__call__", shifted(TransformersBody.__call__))
    for forward in ("auto", "transformers"):
        with pytest.raises(UnsupportedModelError, match=r"answers differently.*try `forward: transformers`"):
            load(tiny_checkpoints[kind], size=VOCAB_SIZES[kind], forward=forward)


@pytest.mark.parametrize(("kind", "heads"), [("llama", 2), ("gemma3", 1), ("qwen3", 2), ("gpt2", 4)])
def test_attention_layers(tiny_checkpoints: dict[Kind, Path], kind: Kind, heads: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoints[kind])
    before = model.config._attn_implementation
    shapes = attention_layers("tiny", model)
    assert [(shape.num_kv_heads, shape.head_size, str(shape.device)) for shape in shapes] == [
        (heads, 16, "cpu")
    ] * 3
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("layers", [[0, 0], [1, 2], []])
def test_survey_wants_one_attention_a_layer(layers: list[int]) -> None:
    model = transformers.LlamaForCausalLM(llama())
    model.model.layers = nn.ModuleList(model.model.layers[: len(layers)])
    for layer, index in zip(model.model.layers, layers, strict=True):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)
    with pytest.raises(UnsupportedModelError, match=r"member 'tiny': .* one attention a layer, numbered from 0"):
        attention_layers("tiny", model)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_a_device_map_answers_as_one_device(tmp_path: Path, device_map: Any) -> None:
    folder = saved(tmp_path, llama())
    ids = list(range(3, 23))
    expected = ask(load(folder), [Feed(1, ids, 20)], SIZE).logprobs
    member = load(folder, device="auto", device_map=device_map)
    found = ask(member, [Feed(1, ids, 20)], SIZE).logprobs
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_accelerate_hooks_pass_the_packed_forward_through(tmp_path: Path) -> None:
    """What accelerate wraps around each module when a map names several devices."""
    from accelerate import dispatch_model

    folder = saved(tmp_path, llama())
    ids = list(range(3, 23))
    expected = ask(load(folder), [Feed(1, ids, 20)], SIZE).logprobs
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    model = dispatch_model(model, device_map | {"lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    member = make_member("tiny", model, letters(), config_of(folder))
    found = ask(member, [Feed(1, ids, 20)], SIZE).logprobs
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """64 tokens of 2 layers with one head of 16: 16 KiB a row."""
    member_folder = saved(tmp_path, llama())
    with caplog.at_level(logging.DEBUG, "ensemble_core.members.loading.proof"):
        member = load(member_folder, max_len=1000)
    assert member.max_len == member.page_size == 64  # the model's own limit
    assert member.num_pages == member.free_pages == 2**20 // (64 * 2 * 2 * 16 * 4)
    model = transformers.LlamaForCausalLM(llama())
    weights = sum(p.numel() * 4 for p in model.parameters())
    angles = 64 * 16 * 2 * 4  # the table of a flat body
    assert member.memory_bytes() == {"cpu": weights + angles + 2**20}
    plain = load(member_folder, max_len=1000, forward="transformers")
    assert plain.memory_bytes() == {"cpu": weights + 2**20}
    assert "packed forward differs by" in caplog.text

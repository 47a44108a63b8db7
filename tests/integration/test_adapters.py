"""Adapters as members: PEFT's own answers from the base's own weights, and refusals of what cannot be served."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_adapters import LARGE, SMALL, TARGETS, peft_logprobs, reweigh, rewrite, tiny_adapter
from tiny_models import KINDS, Kind
from torch import Tensor

from ensemble_core.config import Config
from ensemble_core.errors import CheckpointError, ConfigError, UnsupportedModelError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body import flat
from ensemble_core.members.body.flat import FlatBody
from ensemble_core.members.body.graphs import GraphedBody, eagerly
from ensemble_core.members.body.linear import Linear
from ensemble_core.members.body.low_rank import AdaptedLinear
from ensemble_core.members.body.transformers import TransformersBody
from ensemble_core.members.loading.adapters import read_adapter
from ensemble_core.members.loading.checkpoints import load_vocabulary, pull, resolve_adapter
from ensemble_core.members.loading.memory import plan_caches
from ensemble_core.members.loading.models import Making, load_family, make_family
from ensemble_core.members.local import LocalMember

EXACT = {"atol": 2e-5, "rtol": 1e-5}
WHOLE = 10_000
CACHE = 4 * 2**20
IDS = list(range(5, 45))
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "transformers": {"forward": "transformers"},
    "paged": {"kv_cache": "paged"},
    "graphs": {"kv_cache": "paged"},
}


def family_of(base: Path, adapters: dict[str, Path], **options: Any) -> dict[str, MemberConfig]:
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": CACHE, "max_len": 160} | options
    own = MemberConfig(model=str(base), **settings)
    return {"base": own} | {
        name: own.model_copy(update={"base": "base", "adapter": str(folder)}) for name, folder in adapters.items()
    }


def load(
    base: Path, adapters: dict[str, Path], how: Making | None = None, **options: Any
) -> dict[str, LocalMember]:
    family = family_of(base, adapters, **options)
    own = [read_adapter(name, family[name]) for name in adapters]
    return load_family("base", family, base, load_vocabulary("base", family["base"]), how or Making(), own)


def answers(member: LocalMember, ids: list[int] = IDS) -> Tensor:
    found = ask(member, [Feed(1, ids, len(ids))], WHOLE).logprobs
    member.release(1)
    return found


@pytest.fixture(scope="module")
def small_adapters(
    tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Kind, Path]:
    """On queries and values alone, as PEFT has it by default."""
    root = tmp_path_factory.mktemp("small")
    targets = {kind: {"target_modules": TARGETS.get(kind, SMALL["target_modules"])} for kind in KINDS}
    return {kind: tiny_adapter(tiny_checkpoints[kind], root / kind, 1, **targets[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def large_adapters(
    tiny_checkpoints: dict[Kind, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[Kind, Path]:
    """On every projection, with ranks and alphas of their own, rank-stabilised."""
    root = tmp_path_factory.mktemp("large")
    settings: dict[Kind, dict[str, Any]] = {kind: dict(LARGE) for kind in KINDS}
    settings["gpt2"] |= {"target_modules": [*TARGETS["gpt2"], "c_fc"], "rank_pattern": {"c_fc": 3}}
    return {kind: tiny_adapter(tiny_checkpoints[kind], root / kind, 2, **settings[kind]) for kind in KINDS}


@pytest.fixture(scope="module", params=WAYS)
def families(
    request: pytest.FixtureRequest,
    tiny_checkpoints: dict[Kind, Path],
    small_adapters: dict[Kind, Path],
    large_adapters: dict[Kind, Path],
) -> dict[Kind, dict[str, LocalMember]]:
    """Of every kind a base with two adapters, run in each way."""
    how = Making(max_batch=4, capture=eagerly if request.param == "graphs" else None)
    return {
        kind: load(
            tiny_checkpoints[kind],
            {"small": small_adapters[kind], "large": large_adapters[kind]},
            how,
            **WAYS[request.param],
        )
        for kind in KINDS
    }


@pytest.fixture
def family(kind: Kind, families: dict[Kind, dict[str, LocalMember]]) -> Iterator[dict[str, LocalMember]]:
    yield families[kind]
    for member in families[kind].values():
        member.check_cache()
        assert member.free_pages == member.num_pages


# --- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_answers_as_peft_does(
    kind: Kind,
    family: dict[str, LocalMember],
    tiny_checkpoints: dict[Kind, Path],
    small_adapters: dict[Kind, Path],
    large_adapters: dict[Kind, Path],
) -> None:
    base, folders = tiny_checkpoints[kind], {"small": small_adapters[kind], "large": large_adapters[kind]}
    own = peft_logprobs(base, None, IDS)
    torch.testing.assert_close(answers(family["base"]), own, **EXACT)
    for name, folder in folders.items():
        expected = peft_logprobs(base, folder, IDS)
        assert (expected - own).abs().max() > 0.1, "the adapter changes what is said"
        torch.testing.assert_close(answers(family[name]), expected, **EXACT)
        torch.testing.assert_close(
            answers(family[name]), peft_logprobs(base, folder, IDS, merge=True), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_and_in_a_crowd_it_answers_the_same(kind: Kind, family: dict[str, LocalMember]) -> None:
    member = family["large"]
    whole = answers(member)
    crowd = []
    for step, (begin, end) in enumerate(pairwise([0, 7, 8, 9, 30, 31, 32, len(IDS)])):
        feeds = [Feed(1, IDS[begin:end], end - begin, top_k=WHOLE), Feed(2, [9 + step], 1, top_k=WHOLE)]
        crowd.append(member.forward(feeds).of(0).logprobs.clone())
    torch.testing.assert_close(torch.cat(crowd), whole, **EXACT)
    for seq_id in (1, 2):
        member.release(seq_id)


@pytest.mark.parametrize("architecture", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_other_flat_families(
    architecture: str, forward: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    """Qwen 2 has biases in queries, keys and values; here Mistral has a window."""
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=560,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        sliding_window=12 if architecture == "Mistral" else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoints["qwen3"]).save_pretrained(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "base", tmp_path / "adapter", **LARGE)
    family = load(tmp_path / "base", {"own": adapter}, forward=forward)
    assert isinstance(family["own"]._body, FlatBody) is (forward == "auto")
    for name, folder in {"base": None, "own": adapter}.items():
        torch.testing.assert_close(answers(family[name]), peft_logprobs(tmp_path / "base", folder, IDS), **EXACT)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3"])
def test_bfloat16_stays_within_rounding(
    kind: Kind, tiny_checkpoints: dict[Kind, Path], large_adapters: dict[Kind, Path]
) -> None:
    """The adapted member is as far from float32 as its base is, give or take."""
    base, adapter = tiny_checkpoints[kind], large_adapters[kind]
    family = load(base, {"own": adapter}, dtype="bfloat16")
    distance = {
        name: (answers(family[name]).exp() - peft_logprobs(base, folder, IDS).exp()).abs().sum(dim=1).mean() / 2
        for name, folder in {"base": None, "own": adapter}.items()
    }
    assert distance["own"] < 3 * distance["base"] + 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_holds_for_adapters(
    dtype: str, tiny_checkpoints: dict[Kind, Path], large_adapters: dict[Kind, Path]
) -> None:
    """`Proof.check_steady` compares every bit, alone at once and in pieces in a crowd."""
    family = load(
        tiny_checkpoints["llama"], {"own": large_adapters["llama"]}, Making(deterministic=True), dtype=dtype
    )
    assert not torch.equal(answers(family["own"]), answers(family["base"]))


def test_a_map_over_devices_serves_adapters(
    tiny_checkpoints: dict[Kind, Path], large_adapters: dict[Kind, Path]
) -> None:
    base, adapter = tiny_checkpoints["llama"], large_adapters["llama"]
    family = load(base, {"own": adapter}, device="auto", device_map={"model": "cpu", "lm_head": "cpu"})
    torch.testing.assert_close(answers(family["own"]), peft_logprobs(base, adapter, IDS), **EXACT)


def test_accelerate_hooks_let_an_adapter_through(
    tiny_checkpoints: dict[Kind, Path], large_adapters: dict[Kind, Path]
) -> None:
    """What accelerate wraps around each module where a map names several devices."""
    from accelerate import dispatch_model

    base, adapter = tiny_checkpoints["llama"], large_adapters["llama"]
    family = family_of(base, {"own": adapter})
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model = dispatch_model(model, dict.fromkeys(("model", "lm_head"), "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(model.model, "_hf_hook")
    vocabulary, own = load_vocabulary("base", family["base"]), [read_adapter("own", family["own"])]
    members = make_family("base", model, vocabulary, family, own, Making())
    for name, folder in {"base": None, "own": adapter}.items():
        torch.testing.assert_close(answers(members[name]), peft_logprobs(base, folder, IDS), **EXACT)


# --- memory --------------------------------------------------------------------------------------------------


def _linears(body: FlatBody) -> list[Linear]:
    found = [part for layer in body._layers for part in layer.parts() if isinstance(part, Linear | AdaptedLinear)]
    return [part._base if isinstance(part, AdaptedLinear) else part for part in found] + list(body._head.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_in_memory_once(kind: Kind, family: dict[str, LocalMember]) -> None:
    bodies = {name: member._body for name, member in family.items()}
    bodies = {name: body._body if isinstance(body, GraphedBody) else body for name, body in bodies.items()}
    for name in ("small", "large"):
        base, own = bodies["base"], bodies[name]
        if isinstance(base, FlatBody) and isinstance(own, FlatBody):
            pairs = list(zip(_linears(base), _linears(own), strict=True))
            assert all(left.weight is right.weight for left, right in pairs)
            assert base.embedding is own.embedding
            continue
        assert isinstance(base, TransformersBody)
        assert isinstance(own, TransformersBody)
        theirs = {weight.data_ptr() for weight in base.model.parameters()}
        shared = {weight.data_ptr() for path, weight in own.model.named_parameters() if "lora_" not in path}
        assert shared == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_costs_its_own_weights_and_its_cache(kind: Kind, family: dict[str, LocalMember]) -> None:
    sizes = {
        name: member.memory_bytes()["cpu"] - member._cache.num_bytes()["cpu"] for name, member in family.items()
    }
    assert 0 < sizes["small"] < sizes["large"] < sizes["base"] / 4


def test_nobody_reads_a_cache_of_somebody_else(
    tiny_checkpoints: dict[Kind, Path], small_adapters: dict[Kind, Path], large_adapters: dict[Kind, Path]
) -> None:
    prompt = list(range(5, 69))
    adapters = {"small": small_adapters["llama"], "large": large_adapters["llama"]}
    family = load(tiny_checkpoints["llama"], adapters)
    ask(family["base"], [Feed(1, prompt)], 5)
    family["base"].release(1, keep=True)
    assert [family[name].reuse(2, prompt) for name in adapters] == [0, 0]
    assert family["base"].reuse(2, prompt) > 0


def test_the_plan_counts_an_adapter_by_its_own_files(
    tiny_checkpoints: dict[Kind, Path], small_adapters: dict[Kind, Path], caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_checkpoints["llama"]
    family = family_of(base, {"own": small_adapters["llama"]}, kv_memory="auto")
    with caplog.at_level("INFO"):
        planned = plan_caches(family, dict.fromkeys(family, base), 2)
    assert planned["own"].cache_bytes == planned["base"].cache_bytes
    assert "plan: own on cpu takes about 0.00 GiB of weights" in caplog.text


# --- the proof -----------------------------------------------------------------------------------------------


def _without_keys(side_by_side: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parts, sizes: side_by_side([None if i == 1 else part for i, part in enumerate(parts)], sizes)


def _one_block_too_far(side_by_side: Callable[..., Any]) -> Callable[..., Any]:
    return lambda parts, sizes: side_by_side([*parts[1:], parts[0]], [*sizes[1:], sizes[0]])


@pytest.mark.parametrize("wrong", [_without_keys, _one_block_too_far])
def test_a_wrong_sum_is_caught(
    wrong: Callable[..., Any],
    tiny_checkpoints: dict[Kind, Path],
    large_adapters: dict[Kind, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat, "side_by_side", wrong(flat.side_by_side))
    with pytest.raises(UnsupportedModelError, match="member 'own': LlamaForCausalLM answers differently"):
        load(tiny_checkpoints["llama"], {"own": large_adapters["llama"]})


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "IA3"}, r"member 'own': its adapter is of kind 'IA3'; served is plain LoRA"),
        ({"peft_type": None}, "its adapter is of kind None"),
        ({"use_dora": True}, "its adapter has use_dora: True, which is not served"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"bias": "lora_only", "lora_bias": True}, "bias: 'lora_only', lora_bias: True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices: \[1, 2\]"),
        ({"target_parameters": ["x.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS'"),
        ({"something_new": 3}, "something_new: 3"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    settings: dict[str, Any], expected: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    rewrite(adapter, **settings)
    with pytest.raises(UnsupportedModelError, match=expected):
        load(tiny_checkpoints["llama"], {"own": adapter})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "embed_tokens"], r"weights that are not served: \['base_model.model.model.embed_tokens"),
        (["q_proj", "lm_head"], r"changes \['lm_head'\], which is not served"),
    ],
)
def test_embeddings_and_heads_stay_as_they_are(
    targets: list[str], expected: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    """Matrices are made of embeddings, and a vocabulary is the base's."""
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path, target_modules=targets)
    reweigh(adapter, lambda weights: {name: each for name, each in weights.items() if "base_layer" not in name})
    with pytest.raises(UnsupportedModelError, match=expected):
        load(tiny_checkpoints["llama"], {"own": adapter})


NEW_TOKENS: dict[str, Any] = {
    "added_tokens.json": {"<poem>": 477},
    "tokenizer.json": {"added_tokens": [{"id": 0, "content": "<unk>"}, {"id": 477, "content": "<poem>"}]},
    "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<unk>"}, "477": {"content": "<poem>"}}},
}


@pytest.mark.parametrize("file", NEW_TOKENS)
def test_an_adapter_that_adds_tokens_is_refused(
    file: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_checkpoints["llama"]).save_pretrained(adapter)
    load(tiny_checkpoints["llama"], {"own": adapter})  # the base's own tokens are fine
    (adapter / file).write_text(json.dumps(NEW_TOKENS[file]))
    with pytest.raises(UnsupportedModelError, match=r"member 'own': its adapter adds tokens.*\['<poem>'\]"):
        load(tiny_checkpoints["llama"], {"own": adapter})
    (adapter / file).write_text('{"added_tokens": [{}], "added_tokens_decoder": {"x": {}}, "<poem>": {}}')
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        load(tiny_checkpoints["llama"], {"own": adapter})


def test_an_adapter_of_another_model_is_refused(
    tiny_checkpoints: dict[Kind, Path], small_adapters: dict[Kind, Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"adapter .* cannot be put on its base"):
        load(tiny_checkpoints["llama"], {"own": small_adapters["gpt2"]})
    with pytest.raises(CheckpointError, match=r"adapter .* cannot be put on its base: .* size mismatch for model"):
        load(tiny_checkpoints["gemma3"], {"own": small_adapters["llama"]})


def _fewer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if "layers.1.self_attn.q_proj" not in name}


def _more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    return weights | {name: torch.zeros(4, 64)}


def _magnitudes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_fewer, r"does not fit its base: without weights are \['model.layers.1.self_attn.q_proj.lora_A"),
        (_more, r"without a place \['model.layers.7.self_attn.q_proj.lora_A"),
        (_magnitudes, "weights that are not served: .*lora_magnitude_vector"),
        (lambda weights: {}, "holds no weights"),
    ],
)
def test_weights_must_be_those_that_the_config_says(
    change: Any, expected: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path
) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    reweigh(adapter, change)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=expected):
        load(tiny_checkpoints["llama"], {"own": adapter})


def test_weights_that_are_not_finite_are_refused(tiny_checkpoints: dict[Kind, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    reweigh(adapter, lambda weights: {name: weight * torch.nan for name, weight in weights.items()})
    with pytest.raises(UnsupportedModelError, match="member 'own'"):
        load(tiny_checkpoints["llama"], {"own": adapter})


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_must_be_there_and_whole(file: str, tiny_checkpoints: dict[Kind, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    (adapter / file).write_bytes((adapter / file).read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        load(tiny_checkpoints["llama"], {"own": adapter})
    (adapter / file).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError, match=rf"adapter .* has no {file} \(found adapter_model.bin; pickled"):
        load(tiny_checkpoints["llama"], {"own": adapter})


def test_without_peft_the_extra_is_named(
    tiny_checkpoints: dict[Kind, Path], small_adapters: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"members\.own\.adapter needs the extra unisono\[lora\]"):
        load(tiny_checkpoints["llama"], {"own": small_adapters["llama"]})


def test_a_template_of_its_own_is_told(
    tiny_checkpoints: dict[Kind, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = tiny_adapter(tiny_checkpoints["llama"], tmp_path)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    with caplog.at_level("WARNING", read_adapter.__module__):
        load(tiny_checkpoints["llama"], {"own": adapter})
    assert "own: chats go by the template of its base" in caplog.text


# --- where files are -----------------------------------------------------------------------------------------


def test_pull_tells_an_adapters_own_folder(
    tiny_checkpoints: dict[Kind, Path], small_adapters: dict[Kind, Path]
) -> None:
    base, adapter = tiny_checkpoints["llama"], small_adapters["llama"]
    config = Config(members=family_of(base, {"own": adapter}))
    assert pull(config) == [("base", base), ("own", adapter)]
    assert load_vocabulary("own", config.members["own"]) is load_vocabulary("base", config.members["base"])


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    member = MemberConfig(model="org/base", base="base", adapter=str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"adapter '.*none': no such folder"):
        resolve_adapter(member)
    with pytest.raises(CheckpointError, match=r"adapter 'org/none': not in the hub's cache, and HF_HUB_OFFLINE"):
        resolve_adapter(member.model_copy(update={"adapter": "org/none"}))


def test_an_adapter_comes_from_the_hub_by_its_own_name_and_revision(
    small_adapters: dict[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any, bool]] = []

    def snapshot(repo: str, *, revision: str | None, local_files_only: bool, **_: Any) -> str:
        asked.append((repo, revision, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return str(small_adapters["llama"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    member = MemberConfig(model="org/base", revision="r1", base="base", adapter="org/own", adapter_revision="v2")
    assert resolve_adapter(member) == small_adapters["llama"]
    assert asked == [("org/own", "v2", True), ("org/own", "v2", False)]

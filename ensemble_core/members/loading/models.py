"""From a folder of safetensors to a member that has proved itself.

What cannot be served is refused by name, from the config before anything is loaded where that tells. A model's
layers are probed for what they cache; its body is the flat one where its family is known; and a packed pass in chunks
is compared with the model's own forward (`proof`). On CUDA decode steps become captured graphs, unless they fail
their own proof. Adapters on a model become members of their own around the same weights, each proved against PEFT's
own forward. Does not know schedules or fusion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from ensemble_core.errors import CheckpointError, ConfigError, UnsupportedModelError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.attention.pages import Attention, by_gathering, by_kernel, choose_attention
from ensemble_core.members.attention.rows import FEW
from ensemble_core.members.body.base import Body
from ensemble_core.members.body.flat import FAMILIES, FlatBody, can_flatten, flatten
from ensemble_core.members.body.graphs import Capture, GraphedBody, bucket_sizes, cuda_graphs
from ensemble_core.members.body.transformers import TransformersBody
from ensemble_core.members.cache.base import Cache, LayerShape, bytes_per_token
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.kernels.base import Kernels
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.loading.adapters import Adapter, adapt, low_ranks
from ensemble_core.members.loading.placement import DTYPES, page_size, resolve_device
from ensemble_core.members.loading.proof import Proof, attention_layers
from ensemble_core.members.loading.standstill import guard_default_dtype
from ensemble_core.members.local import LocalMember
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
guard_default_dtype()

_MAX_ROWS = 4096
_MAX_BATCH = 64
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_STATEFUL_ROPE = {"dynamic", "longrope"}  # frequencies that depend on the longest sequence of a pass


def load_member(
    name: str,
    config: MemberConfig,
    folder: Path,
    vocabulary: Vocabulary,
    *,
    max_batch: int = _MAX_BATCH,
    capture: Capture | None = None,
    deterministic: bool = False,
) -> LocalMember:
    """Load a model from a folder of safetensors and place it; keywords as of `make_member`.

    Raises UnsupportedModelError (by name, with the reason), CheckpointError, ConfigError.
    """
    how = Making(max_batch, capture, deterministic)
    return load_family(name, {name: config}, folder, vocabulary, how)[name]


def load_family(
    base: str,
    family: Mapping[str, MemberConfig],
    folder: Path,
    vocabulary: Vocabulary,
    how: Making,
    adapters: Sequence[Adapter] = (),
) -> dict[str, LocalMember]:
    """The member `base` and those of its adapters. family: all of them. folder: its own. Raises as `load_member`."""
    return make_family(base, _read_model(base, family[base], folder), vocabulary, family, adapters, how)


def load_adapter(
    adapter: Adapter, config: MemberConfig, folder: Path, base: LocalMember, how: Making
) -> LocalMember:
    """One more member around the weights of a base that serves. folder: the base's. Raises as `load_member`.

    The base's model is read once more, since the adapter is proved against it, and goes before the member serves.
    """
    name, model = adapter.member, _read_model(adapter.member, config, folder)
    layers = attention_layers(name, model)
    kernels = choose((layer.device for layer in layers), model.dtype)
    own = adapt(adapter, model)
    draft = _draft(name, config, own, vocabulary=base.vocabulary, layers=layers)
    if isinstance(base.body, TransformersBody):
        model, own = base.body.model, adapt(adapter, base.body.model)
    make = _adapted(own, model, layers[-1].device, isinstance(base.body, FlatBody))
    del model, own
    return _member(draft, make(base.body), kernels, base.vocabulary, layers, how)


def _read_model(name: str, config: MemberConfig, folder: Path) -> Any:
    """A model of transformers in its place."""
    _refuse_unsupported(name, _read_config(name, config, folder))
    placement: dict[str, Any] = {"device_map": config.device_map, "max_memory": config.max_memory}
    if config.device_map is None:
        placement = {"device_map": {"": resolve_device(name, config)}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(config.dtype, "auto"),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            **placement,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"member {name!r}: {folder} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Making:
    """How members are made.

    max_batch: sequences that decode at once. capture: how graphs are made; None: as the device can. deterministic:
    answers do not depend, in any bit, on what else is in a pass or on how a sequence was cut into feeds.
    """

    max_batch: int = _MAX_BATCH
    capture: Capture | None = None
    deterministic: bool = False


def make_member(
    name: str,
    model: Any,
    vocabulary: Vocabulary,
    config: MemberConfig,
    *,
    max_batch: int = _MAX_BATCH,
    capture: Capture | None = None,
    deterministic: bool = False,
) -> LocalMember:
    """A member out of a model, which cannot be used otherwise afterwards; keywords as of `Making`.

    Raises UnsupportedModelError, ConfigError.
    """
    return make_family(name, model, vocabulary, {name: config}, (), Making(max_batch, capture, deterministic))[
        name
    ]


def make_family(
    base: str,
    model: Any,
    vocabulary: Vocabulary,
    family: Mapping[str, MemberConfig],
    adapters: Sequence[Adapter],
    how: Making,
) -> dict[str, LocalMember]:
    """The member `base` out of a model, and one for each adapter around the same weights. Raises as `load_member`.

    A flat body takes the model's weights over, so what the models of all adapters say is asked before.
    """
    layers = attention_layers(base, model)
    kernels = choose((layer.device for layer in layers), model.dtype)
    draft = partial(_draft, vocabulary=vocabulary, layers=layers)
    flat = family[base].forward == "auto" and can_flatten(model)
    drafts = [draft(base, family[base], model)]
    bodies: list[Callable[[Body], Body]] = [lambda body: body]
    for adapter in adapters:
        own = adapt(adapter, model)
        drafts.append(draft(adapter.member, family[adapter.member], own))
        bodies.append(_adapted(own, model, layers[-1].device, flat))
        del own  # of a flat body only the adapter is kept
    with torch.inference_mode():
        flattened = flatten(model, drafts[0].max_len, kernels) if flat else None
    body: Body = flattened or TransformersBody(model, layers[-1].device)
    made = [
        _member(each, make(body), kernels, vocabulary, layers, how)
        for each, make in zip(drafts, bodies, strict=True)
    ]
    return {member.name: member for member in made}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A member without a body: its cache, and what its model's own forward says.

    renew: makes a cache like it. dtype: of the model. adapts: its body is an adapter's.
    """

    name: str
    max_len: int
    renew: Callable[[], Cache]
    cache: Cache
    proof: Proof
    dtype: torch.dtype
    adapts: bool


def _draft(
    name: str, config: MemberConfig, model: Any, *, vocabulary: Vocabulary, layers: list[LayerShape]
) -> _Draft:
    max_len = min(config.max_len, _longest(model))
    renew = partial(_cache, name, config, layers, max_len, model.dtype)
    cache = renew()
    with torch.inference_mode():
        proof = Proof(name, model, len(vocabulary), max_len)
    return _Draft(name, max_len, renew, cache, proof, model.dtype, config.adapter is not None)


def _adapted(own: Any, model: Any, device: torch.device, flat: bool) -> Callable[[Body], Body]:
    """Makes the body of an adapted model out of its base's body. own: the adapted model; model: the base."""
    if not flat:
        return lambda _: TransformersBody(own, device, shared=model.parameters())
    adapters = low_ranks(own)

    def make(base: Body) -> Body:
        assert isinstance(base, FlatBody)
        with torch.inference_mode():
            return base.adapted(adapters)

    return make


def _member(
    draft: _Draft,
    body: Body,
    kernels: Kernels,
    vocabulary: Vocabulary,
    layers: list[LayerShape],
    how: Making,
) -> LocalMember:
    """A member that has proved itself."""
    name, cache, proof, device = draft.name, draft.cache, draft.proof, layers[-1].device
    attention: Attention = by_gathering
    if isinstance(cache, PagedCache):
        attention = choose_attention(name, layers, draft.dtype, cache.page_size)
    few = FEW
    if how.deterministic:
        _make_steady(name, body, cache, kernels)
        few = draft.max_len
    member = LocalMember(
        name,
        vocabulary,
        draft.max_len,
        body,
        cache,
        kernels,
        device,
        attention,
        few,
        draft.renew,
        adapts=draft.adapts,
    )
    proof.check(member)
    if how.deterministic:
        proof.check_steady(member)
    capture = how.capture or _capture(attention, layers)
    if isinstance(cache, PagedCache) and capture is not None:
        sizes = bucket_sizes(how.max_batch)
        _adopt_graphs(member, _graphed(body, attention, device, sizes, capture), proof, sizes)
    return member


def _make_steady(name: str, body: Body, cache: Cache, kernels: Kernels) -> None:
    """Let each token's numbers be a function of its own sequence; raises ConfigError where that cannot be had."""
    needs = {
        "a cache in rows (device: cpu, kv_cache: rows)": isinstance(cache, KVCache),
        "compiled attention (device: cpu, dtype: float32 or bfloat16, unisono[cpu])": kernels.attend_spans
        is not None,
        f"forward: auto and one of the families {', '.join(sorted(FAMILIES))}": isinstance(body, FlatBody),
        "products of matrices that do not depend on where a row stands, which this processor lacks": (
            not isinstance(body, FlatBody) or body.make_steady()
        ),
    }
    if lacking := [what for what, given in needs.items() if not given]:
        raise ConfigError(
            f"deterministic: true cannot be kept by member {name!r}, which needs {', and '.join(lacking)}; change "
            "that, or drop `deterministic`"
        )


def _read_config(name: str, config: MemberConfig, folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"member {name!r}: the config of {folder} cannot be read: {error}") from error


def _refuse_unsupported(name: str, config: Any) -> None:
    """What the config says about layers that a cache of keys and values cannot hold."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"member {name!r}: {config.model_type} is an encoder-decoder model")
    kinds = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise UnsupportedModelError(
            f"member {name!r}: {config.model_type} has layers of kind {sorted(kinds)}; supported are "
            f"{sorted(_LAYER_TYPES)}"
        )
    if _rope_types(getattr(text, "rope_parameters", None)) & _STATEFUL_ROPE:
        raise UnsupportedModelError(
            f"member {name!r}: {config.model_type} has rotary embeddings of kind {sorted(_STATEFUL_ROPE)}, whose "
            "frequencies depend on the other sequences of a pass; choose another `rope_type` in its config"
        )


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def _longest(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else 2**31


def _cache(name: str, config: MemberConfig, layers: list[LayerShape], max_len: int, dtype: torch.dtype) -> Cache:
    """Rows or pages, as many as the memory holds. Raises ConfigError where that is not one sequence."""
    memory, token_bytes = config.cache_bytes, bytes_per_token(layers, dtype)
    size = page_size(config, layers[-1].device)
    if size is None:
        _check_memory(name, memory, max_len * token_bytes)
        return KVCache(layers, min(memory // (max_len * token_bytes), _MAX_ROWS), max_len, dtype)
    num_pages = memory // (size * token_bytes) - 1  # one more is scratch
    _check_memory(name, memory, (-(-max_len // size) + 1) * size * token_bytes)
    return PagedCache(layers, num_pages, size, max_len, dtype)


def _capture(attention: Attention, layers: Sequence[LayerShape]) -> Capture | None:
    """How decode steps are captured: not without the kernel, since copies of whole tables would be captured."""
    devices = {layer.device for layer in layers}
    return cuda_graphs(layers[0].device) if attention is by_kernel and len(devices) == 1 else None


def _graphed(
    body: Body, attention: Attention, device: torch.device, sizes: Sequence[int], capture: Capture
) -> Callable[[Cache], Body]:
    """What captures graphs over a cache."""

    def make(cache: Cache) -> Body:
        assert isinstance(cache, PagedCache), "graphs read pages"
        return GraphedBody(body, cache, attention, device, sizes, capture)

    return make


def _adopt_graphs(member: LocalMember, graphed: Callable[[Cache], Body], proof: Proof, sizes: list[int]) -> None:
    """Decode through graphs if they can be captured and answer as the body itself does; else stay without."""
    try:
        expected = {size: proof.step(member, size) for size in sizes}
        member.adopt(graphed)
        for size in sizes:
            proof.check_step(member, size, expected[size])
    except Exception as error:  # whatever libraries raise in a capture
        logger.warning("%s: decoding goes on without graphs: %s", member.name, error)
        member.adopt(None)


def _check_memory(name: str, memory: int, needed: int) -> None:
    if memory < needed:
        raise ConfigError(
            f"members.{name}.kv_memory: {memory} bytes hold no sequence of max_len tokens, which needs "
            f"{needed}; raise kv_memory or lower max_len"
        )

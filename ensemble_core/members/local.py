"""A member that lives in this process: a transformers model behind the packed forward.

Invariants: a forward either advances every sequence it was fed or none; the answer is the model's own, whatever
else is in the pass. At load the model proves that it can work so: its attention is surveyed, and a packed pass in
chunks is compared with its own forward. Does not know scheduling, fusion or text.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ensemble_core.config import MemberConfig
from ensemble_core.errors import CheckpointError, ConfigError, MemberError, UnsupportedModelError
from ensemble_core.members.attention import PackedPass, pack
from ensemble_core.members.base import Candidates, Feed
from ensemble_core.members.body import Body, TransformersBody
from ensemble_core.members.candidates import likelihoods, top_candidates
from ensemble_core.members.flat import flatten
from ensemble_core.members.kv_cache import KVCache, LayerShape, bytes_per_token
from ensemble_core.members.placement import DTYPES, resolve_device
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_SURVEY = "unisono_survey"
_MAX_ROWS = 4096
_PROVED = 12  # positions compared in the proof at load
_MAX_PROVED_WINDOW = 1024  # a longer sliding window is not filled for the proof
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_STATEFUL_ROPE = {"dynamic", "longrope"}  # frequencies that depend on the longest sequence of a pass


class LocalMember:
    """See `ensemble_core.members.base.Member`."""

    def __init__(self, name: str, model: Any, vocabulary: Vocabulary, config: MemberConfig) -> None:
        self.name = name
        self.vocabulary = vocabulary
        layers = survey(name, model)
        self.device = layers[-1].device
        self.max_len = min(config.max_len, _longest(model))
        dtype = model.dtype
        num_rows = _num_rows(name, config.cache_bytes, self.max_len * bytes_per_token(layers, dtype))
        self._cache = KVCache(layers, num_rows, self.max_len, dtype)
        with torch.inference_mode():
            proof = Proof(name, model, len(vocabulary), self.max_len)
            flat = flatten(model, self.max_len) if config.forward == "auto" else None
        self._body: Body = flat or TransformersBody(model, self.device)
        self._memory = _sum_bytes(self._body.num_bytes(), self._cache.num_bytes())
        proof.check(self)

    @property
    def page_size(self) -> int:
        """A page is a row."""
        return self.max_len

    @property
    def num_pages(self) -> int:
        """Rows."""
        return self._cache.num_rows

    @property
    def free_pages(self) -> int:
        """Rows that no sequence holds."""
        return self._cache.num_free

    def forward(self, feeds: Sequence[Feed], top_k: int) -> Candidates:
        """See `Member.forward`."""
        try:
            with torch.inference_mode():
                candidates = self._forward(feeds, top_k)
        except Exception as error:
            raise MemberError(self.name, f"forward failed: {type(error).__name__}: {error}") from error
        for feed in feeds:
            self._cache.advance(feed.seq_id, feed.token_ids)
        return candidates

    def rollback(self, seq_id: int, length: int) -> None:
        """See `Member.rollback`."""
        self._cache.rollback(seq_id, length)

    def reuse(self, seq_id: int, token_ids: Sequence[int]) -> int:
        """See `Member.reuse`; a shorter prefix than `kv_cache.MIN_PREFIX` is not worth it."""
        return self._cache.reuse(seq_id, token_ids)

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`."""
        self._cache.release(seq_id, keep)

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`."""
        return self._memory

    def check_cache(self) -> None:
        """Integrity of the cache; see `KVCache.check`."""
        self._cache.check()

    def _forward(self, feeds: Sequence[Feed], top_k: int) -> Candidates:
        run, order = self._pack(feeds)
        token_ids = [token_id for i in order for token_id in feeds[i].token_ids]
        answering, followed = _places(feeds, order)
        logits = self._body(run, torch.tensor(token_ids), torch.tensor(answering + followed, dtype=torch.long))
        also = [ids for feed in feeds for ids in feed.also or ((),) * feed.wanted]
        candidates = top_candidates(logits[: len(answering)], top_k, also)
        if not followed:
            return candidates
        found = likelihoods(logits[len(answering) :], [feed.following for feed in feeds])
        return replace(candidates, likelihoods=found)

    def _pack(self, feeds: Sequence[Feed]) -> tuple[PackedPass, list[int]]:
        assert len({feed.seq_id for feed in feeds}) == len(feeds), "a sequence is fed twice"
        counts = [len(feed.token_ids) for feed in feeds]
        rows = [self._cache.reserve(feed.seq_id, count) for feed, count in zip(feeds, counts, strict=True)]
        return pack(self._cache, rows, counts)


def load_member(name: str, config: MemberConfig, folder: Path, vocabulary: Vocabulary) -> LocalMember:
    """Load a model from a folder of safetensors and place it.

    Raises UnsupportedModelError (by name, with the reason), CheckpointError, ConfigError.
    """
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
    model.eval().requires_grad_(False)
    return LocalMember(name, model, vocabulary, config)


def _read_config(name: str, config: MemberConfig, folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"member {name!r}: the config of {folder} cannot be read: {error}") from error


def survey(name: str, model: Any) -> list[LayerShape]:
    """What each attention layer caches, seen by a one-token forward through the attention interface.

    Raises UnsupportedModelError where the model does not go through it, or not once a layer.
    """
    forward = inspect.signature(model.forward).parameters
    if not getattr(model, "_supports_attention_backend", False) or "logits_to_keep" not in forward:
        raise UnsupportedModelError(
            f"member {name!r}: {type(model).__name__} does not support transformers' attention interface"
        )
    seen = _Survey()
    try:
        with torch.inference_mode(), _Attention(model, _SURVEY):
            device = model.get_input_embeddings().weight.device
            ids = torch.zeros(1, 1, dtype=torch.long, device=device)
            model(input_ids=ids, position_ids=ids, use_cache=False, unisono=seen)
    except Exception as error:
        raise UnsupportedModelError(
            f"member {name!r}: {type(model).__name__} fails in transformers' attention interface: {error}"
        ) from error
    found = sorted(seen.layers, key=lambda item: item[0])
    if [index for index, _ in found] != list(range(len(found))) or not found:
        raise UnsupportedModelError(
            f"member {name!r}: {type(model).__name__} has layers {[i for i, _ in found]} in the attention "
            "interface, where one attention a layer, numbered from 0, is needed"
        )
    return [shape for _, shape in found]


class Proof:
    """What a model's own forward says, kept to be compared with the member that is made of it.

    What rounding does to this model is measured on the spot, between its own eager and its own default attention:
    the packed forward may differ by a few times that, in total variation averaged over positions.
    """

    def __init__(self, name: str, model: Any, vocabulary_size: int, max_len: int) -> None:
        self._kind, size = type(model).__name__, _proof_length(model, max_len)
        self._wanted = size // 2 if size < 2 * _PROVED else _PROVED
        ids = torch.randint(0, vocabulary_size, (size,), generator=torch.Generator().manual_seed(0))
        self._ids: list[int] = ids.tolist()
        with torch.inference_mode():
            self._own = _own_probabilities(model, self._ids, self._wanted)
            with _Attention(model, "eager"):
                self._noise = _total_variation(self._own, _own_probabilities(model, self._ids, self._wanted))

    def check(self, member: LocalMember) -> None:
        """A packed pass in chunks against the model's own forward; raises UnsupportedModelError."""
        rest, last = self._ids[: -self._wanted], self._ids[-self._wanted :]
        try:
            member.forward([Feed(-1, rest, 0)], 2)
            packed = member.forward([Feed(-1, last, self._wanted)], len(member.vocabulary))
        except MemberError as error:
            raise UnsupportedModelError(f"{error}; it cannot be a member") from error
        member.release(-1)
        difference, allowed = _total_variation(self._own, packed.logprobs.exp()), 5 * self._noise + 1e-4
        if not difference <= allowed:
            raise UnsupportedModelError(
                f"member {member.name!r}: {self._kind} answers differently through the packed forward (total "
                f"variation {difference:.3g}, allowed {allowed:.3g}); try `forward: transformers`"
            )
        logger.debug("%s: packed forward differs by %.2g, rounding by %.2g", member.name, difference, self._noise)


def _proof_length(model: Any, max_len: int) -> int:
    """Tokens that reach past a sliding window, if there is one that a quick proof can afford."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    longest = window + _PROVED if window <= _MAX_PROVED_WINDOW else 0
    return int(min(max(2 * _PROVED, longest), max_len))


def _own_probabilities(model: Any, ids: list[int], wanted: int) -> Tensor:
    """Of the last `wanted` positions, through the model's own forward: (wanted, V) float32."""
    inputs = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=wanted).logits[0]
    return logits.float().softmax(dim=1)  # type: ignore[no-any-return]


def _total_variation(left: Tensor, right: Tensor) -> float:
    """Between rows of probabilities (N, V), averaged over rows."""
    return (left - right.to(left.device)).abs().sum(dim=1).mean().item() / 2


class _Attention:
    """Within the block the model uses another attention implementation."""

    def __init__(self, model: Any, implementation: str) -> None:
        self._model, self._implementation = model, implementation

    def __enter__(self) -> None:
        self._before = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._implementation)

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._before)


@dataclass(frozen=True, slots=True)
class _Survey:
    """What the layers report; an object, since accelerate's hooks hand on copies of lists."""

    layers: list[tuple[int, LayerShape]] = field(default_factory=list)


def _survey_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if value.shape != key.shape:
        raise UnsupportedModelError(f"keys of shape {tuple(key.shape)} and values of {tuple(value.shape)}")
    shape = LayerShape(key.shape[1], key.shape[3], key.device)
    kwargs["unisono"].layers.append((module.layer_idx, shape))
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register(_SURVEY, _survey_attention)


def _places(feeds: Sequence[Feed], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """Places in the pass that must answer, and those where a following id is asked for, in the order of the feeds."""
    ends: dict[int, int] = {}
    end = 0
    for i in order:
        end += len(feeds[i].token_ids)
        ends[i] = end
    answering = [p for i, feed in enumerate(feeds) for p in range(ends[i] - feed.wanted, ends[i])]
    followed = [
        ends[i] - len(feed.token_ids) + at
        for i, feed in enumerate(feeds)
        for at, token_id in enumerate(feed.following)
        if token_id >= 0
    ]
    return answering, followed


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


def _sum_bytes(*sizes: dict[str, int]) -> dict[str, int]:
    return dict(sum((Counter(size) for size in sizes), Counter()))


def _num_rows(name: str, memory: int, row_bytes: int) -> int:
    if memory < row_bytes:
        raise ConfigError(
            f"members.{name}.kv_memory: {memory} bytes hold no sequence of max_len tokens, which needs "
            f"{row_bytes}; raise kv_memory or lower max_len"
        )
    return min(memory // row_bytes, _MAX_ROWS)

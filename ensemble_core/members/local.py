"""A member that lives in this process: a transformers model behind the packed forward.

Invariants: a forward either advances every sequence it was fed or none; the answer is the model's own, whatever
else is in the pass. At load the model proves that it can work so: its attention is surveyed, and a packed pass in
chunks is compared with its own forward. Its cache is rows or pages; on CUDA decode steps are captured graphs, unless
they fail their own proof. Does not know scheduling, fusion or text.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from ensemble_core.config import MemberConfig
from ensemble_core.errors import CheckpointError, ConfigError, MemberError, UnsupportedModelError
from ensemble_core.members.attention.pages import Attention, by_gathering, by_kernel, choose_attention, pack_pages
from ensemble_core.members.attention.rows import Pass, pack, span_attention
from ensemble_core.members.base import Candidates, Feed
from ensemble_core.members.body.flat import flatten
from ensemble_core.members.body.graphs import Capture, GraphedBody, bucket_sizes, cuda_graphs
from ensemble_core.members.body.transformers import Body, TransformersBody
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.cache.rows import Cache, KVCache, LayerShape, bytes_per_token
from ensemble_core.members.candidates import likelihoods, top_candidates
from ensemble_core.members.loading.placement import DTYPES, page_size, resolve_device
from ensemble_core.members.loading.proof import Proof, survey
from ensemble_core.members.streams import lane_on
from ensemble_core.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_MAX_ROWS = 4096
_MAX_BATCH = 64
_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}
_STATEFUL_ROPE = {"dynamic", "longrope"}  # frequencies that depend on the longest sequence of a pass


class LocalMember:
    """See `ensemble_core.members.base.Member`."""

    def __init__(
        self,
        name: str,
        model: Any,
        vocabulary: Vocabulary,
        config: MemberConfig,
        *,
        max_batch: int = _MAX_BATCH,
        capture: Capture | None = None,
    ) -> None:
        """max_batch: sequences that decode at once. capture: how graphs are made; None: as the device can."""
        self.name = name
        self.vocabulary = vocabulary
        layers = survey(name, model)
        self.device = layers[-1].device
        self.max_len = min(config.max_len, _longest(model))
        self._cache: Cache = _cache(name, config, layers, self.max_len, model.dtype)
        with torch.inference_mode():
            proof = Proof(name, model, len(vocabulary), self.max_len)
            flat = flatten(model, self.max_len) if config.forward == "auto" else None
        self._body: Body = flat or TransformersBody(model, self.device)
        self._memory = _sum_bytes(self._body.num_bytes(), self._cache.num_bytes())
        self._lane = lane_on(self.device)
        self._by_spans = span_attention(layers, model.dtype)
        self._attention: Attention = by_gathering
        if isinstance(self._cache, PagedCache):
            self._attention = choose_attention(name, layers, model.dtype, self._cache.page_size)
        proof.check(self)
        if isinstance(self._cache, PagedCache):
            self._adopt_graphs(self._cache, proof, capture or _capture(self._attention, layers), max_batch)

    @property
    def page_size(self) -> int:
        """Tokens a page; a row is one page."""
        return self._cache.page_size

    @property
    def num_pages(self) -> int:
        """Pages, or rows."""
        return self._cache.num_pages

    @property
    def free_pages(self) -> int:
        """Pages, or rows, that no sequence holds."""
        return self._cache.num_free

    def forward(self, feeds: Sequence[Feed], top_k: int) -> Candidates:
        """See `Member.forward`."""
        try:
            with torch.inference_mode():
                candidates = self._lane.forward(lambda: self._forward(feeds, top_k))
        except Exception as error:
            raise MemberError(self.name, f"forward failed: {type(error).__name__}: {error}") from error
        for feed in feeds:
            self._cache.advance(feed.seq_id, feed.token_ids)
        return candidates

    def rollback(self, seq_id: int, length: int) -> None:
        """See `Member.rollback`."""
        with self._lane.work():
            self._cache.rollback(seq_id, length)

    def reuse(self, seq_id: int, token_ids: Sequence[int]) -> int:
        """See `Member.reuse`; a shorter prefix than `kv_cache.MIN_PREFIX` is not worth it."""
        with self._lane.work():
            return self._cache.reuse(seq_id, token_ids)

    def release(self, seq_id: int, keep: bool = False) -> None:
        """See `Member.release`."""
        with self._lane.work():
            self._cache.release(seq_id, keep)

    def memory_bytes(self) -> dict[str, int]:
        """See `Member.memory_bytes`."""
        return self._memory

    def check_cache(self) -> None:
        """Integrity of the cache; see `Cache.check`."""
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

    def _pack(self, feeds: Sequence[Feed]) -> tuple[Pass, list[int]]:
        assert len({feed.seq_id for feed in feeds}) == len(feeds), "a sequence is fed twice"
        cache, counts = self._cache, [len(feed.token_ids) for feed in feeds]
        if isinstance(cache, PagedCache):
            chains = [cache.reserve(feed.seq_id, count) for feed, count in zip(feeds, counts, strict=True)]
            return pack_pages(cache, chains, counts, self._attention)
        assert isinstance(cache, KVCache)
        rows = [cache.reserve(feed.seq_id, count) for feed, count in zip(feeds, counts, strict=True)]
        return pack(cache, rows, counts, self._by_spans)

    def _adopt_graphs(self, cache: PagedCache, proof: Proof, capture: Capture | None, max_batch: int) -> None:
        """Decode through graphs if they can be captured and answer as the body itself does; else stay without."""
        if capture is None:
            return
        body, sizes = self._body, bucket_sizes(max_batch)
        try:
            expected = {size: proof.step(self, size) for size in sizes}
            with torch.inference_mode(), self._lane.work():
                self._body = GraphedBody(body, cache, self._attention, self.device, sizes, capture)
            for size in sizes:
                proof.check_step(self, size, expected[size])
        except Exception as error:  # whatever libraries raise in a capture
            logger.warning("%s: decoding goes on without graphs: %s", self.name, error)
            self._body = body


def load_member(
    name: str,
    config: MemberConfig,
    folder: Path,
    vocabulary: Vocabulary,
    *,
    max_batch: int = _MAX_BATCH,
    capture: Capture | None = None,
) -> LocalMember:
    """Load a model from a folder of safetensors and place it; keywords as of `LocalMember`.

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
    return LocalMember(name, model, vocabulary, config, max_batch=max_batch, capture=capture)


def _read_config(name: str, config: MemberConfig, folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"member {name!r}: the config of {folder} cannot be read: {error}") from error


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


def _check_memory(name: str, memory: int, needed: int) -> None:
    if memory < needed:
        raise ConfigError(
            f"members.{name}.kv_memory: {memory} bytes hold no sequence of max_len tokens, which needs "
            f"{needed}; raise kv_memory or lower max_len"
        )

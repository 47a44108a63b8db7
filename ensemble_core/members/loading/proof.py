"""What is found out about a model before it serves: what its layers cache, and that the packed forward is its own.

`attention_layers` sees every layer's keys in a one-token forward. `Proof` keeps what the model's own forward says, so
that the member which is made of it can be compared: in a packed pass, and in decode steps that are captured graphs.
Does not know checkpoints, devices or configurations.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from ensemble_core.errors import MemberError, UnsupportedModelError
from ensemble_core.members.attention.rows import FEW
from ensemble_core.members.base import Candidates, Feed, Member, ask
from ensemble_core.members.cache.base import LayerShape

logger = logging.getLogger(__name__)

_PROBE = "unisono_probe"
_PROVED = 12  # positions compared in the proof at load
_COMPARED = 64  # candidates, where every bit of them must agree
_MAX_PROVED_WINDOW = 1024  # a longer sliding window is not filled for the proof


def attention_layers(name: str, model: Any) -> list[LayerShape]:
    """What each attention layer caches, seen by a one-token forward through the attention interface.

    Raises UnsupportedModelError where the model does not go through it, or not once a layer.
    """
    forward = inspect.signature(model.forward).parameters
    if not getattr(model, "_supports_attention_backend", False) or "logits_to_keep" not in forward:
        raise UnsupportedModelError(
            f"member {name!r}: {type(model).__name__} does not support transformers' attention interface"
        )
    seen = _Seen()
    try:
        with torch.inference_mode(), _WithAttention(model, _PROBE):
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
            with _WithAttention(model, "eager"):
                self._noise = _total_variation(self._own, _own_probabilities(model, self._ids, self._wanted))

    @property
    def allowed(self) -> float:
        """Total variation that rounding may explain."""
        return 5 * self._noise + 1e-4

    def check(self, member: Member) -> None:
        """A packed pass in chunks against the model's own forward; raises UnsupportedModelError.

        The last chunk once has few tokens and once many, which attend in different ways.
        """
        few, many = self._wanted, min(FEW + 4, len(self._ids) - 1)
        try:
            member.forward([Feed(-1, self._ids[:-few], 0)])
            found = [self._last(member, few), self._last(member, many)]
        except MemberError as error:
            raise UnsupportedModelError(f"{error}; it cannot be a member") from error
        member.release(-1)
        difference = max(_total_variation(self._own, packed) for packed in found)
        if not difference <= self.allowed:
            raise UnsupportedModelError(
                f"member {member.name!r}: {self._kind} answers differently through the packed forward (total "
                f"variation {difference:.3g}, allowed {self.allowed:.3g}); try `forward: transformers`"
            )
        logger.debug("%s: packed forward differs by %.2g, rounding by %.2g", member.name, difference, self._noise)

    def _last(self, member: Member, num: int) -> Tensor:
        """Probabilities of the wanted positions, with the last `num` tokens fed at once."""
        feed = Feed(-1, self._ids[-num:], self._wanted, keep=len(self._ids) - num)
        return ask(member, [feed], len(member.vocabulary)).logprobs.exp()

    def check_steady(self, member: Member) -> None:
        """The same answers, bit for bit, alone at once and in pieces in a crowd; raises UnsupportedModelError."""
        alone = ask(member, [Feed(-1, self._ids, self._wanted)], _COMPARED)
        member.release(-1)
        ends = [0, self._wanted // 2, *range(len(self._ids) - self._wanted, len(self._ids) + 1)]
        pieces = [self._ids[begin:end] for begin, end in pairwise(ends)]
        crowd = [self._in_a_crowd(member, piece, num) for num, piece in enumerate(pieces)][2:]
        member.release(-1)
        for name in ("token_ids", "logprobs", "tail"):
            if not torch.equal(getattr(alone, name), torch.cat([getattr(answer, name) for answer in crowd])):
                raise UnsupportedModelError(
                    f"member {member.name!r}: {self._kind} does not answer the same alone and in a crowd, as "
                    "`deterministic` wants it to; drop that"
                )

    def _in_a_crowd(self, member: Member, piece: list[int], num: int) -> Candidates:
        """What the sequence answers to its next tokens beside `num` others, each as long as its place."""
        others = [Feed(-2 - i, self._ids[i : 2 * i + 1]) for i in range(min(num, member.num_pages - 1))]
        answer = ask(member, [*others, Feed(-1, piece)], _COMPARED)
        for other in others:
            member.release(other.seq_id)
        return answer.rows([len(others)])

    def check_step(self, member: Member, size: int, expected: Tensor) -> None:
        """A decode step against the same step taken in another way; raises UnsupportedModelError."""
        difference = _total_variation(expected, self.step(member, size))
        if not difference <= self.allowed:
            raise UnsupportedModelError(
                f"a step of {size} sequences differs (total variation {difference:.3g}, allowed {self.allowed:.3g})"
            )

    def step(self, member: Member, size: int) -> Tensor:
        """(B, V) probabilities of a decode step of `size` sequences, or of as many as there are pages for.

        One holds all ids of the proof, the others a few.
        """
        size = min(size, member.num_pages + 1 - -(-len(self._ids) // member.page_size))
        prompts = [self._ids[:-1], *(self._ids[: 1 + i % 7] for i in range(1, size))]
        try:
            member.forward([Feed(-1 - i, prompt, 0) for i, prompt in enumerate(prompts)])
            feeds = [Feed(-1 - i, self._ids[-1:]) for i in range(size)]
            return ask(member, feeds, len(member.vocabulary)).logprobs.exp()
        finally:
            for i in range(size):
                member.release(-1 - i)


def _proof_length(model: Any, max_len: int) -> int:
    """Tokens that reach past a sliding window, if there is one that a quick proof can afford."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    longest = window + _PROVED if window <= _MAX_PROVED_WINDOW else 0
    return int(min(max(2 * _PROVED, longest), max_len))


def _own_probabilities(model: Any, ids: list[int], wanted: int) -> Tensor:
    """Of the last `wanted` positions, through the model's own forward: (wanted, V) float32."""
    inputs = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    with _WideProducts():
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=wanted).logits[0]
    return logits.float().softmax(dim=1)  # type: ignore[no-any-return]


def _total_variation(left: Tensor, right: Tensor) -> float:
    """Between rows of probabilities (N, V), averaged over rows."""
    return (left - right.to(left.device)).abs().sum(dim=1).mean().item() / 2


_PRODUCTS = (linear, torch.matmul)


class _WideProducts(TorchFunctionMode):
    """Within the block a processor without bf16 instructions multiplies bf16 in float32, and rounds the products.

    That is what its own bf16 products do, a number at a time: a minute for a model of 270 million weights.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS or not _is_narrow(args[0]):
            return func(*args, **(kwargs or {}))
        wide = [None if each is None else each.float() for each in args]
        return func(*wide, **{name: value.float() for name, value in (kwargs or {}).items()}).to(args[0].dtype)


def _is_narrow(x: Tensor) -> bool:
    """Whether this is bf16 that the processor cannot multiply."""
    on_cpu = x.device.type == "cpu" and x.dtype is torch.bfloat16
    return on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _WithAttention:
    """Within the block the model uses another attention implementation."""

    def __init__(self, model: Any, implementation: str) -> None:
        self._model, self._implementation = model, implementation

    def __enter__(self) -> None:
        self._before = self._model.config._attn_implementation
        self._model.set_attn_implementation(self._implementation)

    def __exit__(self, *_: object) -> None:
        self._model.set_attn_implementation(self._before)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the layers report; an object, since accelerate's hooks hand on copies of lists."""

    layers: list[tuple[int, LayerShape]] = field(default_factory=list)


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if value.shape != key.shape:
        raise UnsupportedModelError(f"keys of shape {tuple(key.shape)} and values of {tuple(value.shape)}")
    shape = LayerShape(key.shape[1], key.shape[3], key.device)
    kwargs["unisono"].layers.append((module.layer_idx, shape))
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register(_PROBE, _probe_attention)

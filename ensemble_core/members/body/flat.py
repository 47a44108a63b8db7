"""The layers of well-known decoder families as one flat loop: the same numbers as transformers, in fewer calls.

At a small batch a layer's arithmetic takes less time than the calls around it, so a family whose arithmetic is known
is run from its weights: merged projections, one rotation for queries and keys together, tables of rotary angles made
once, residual sums and norms in one go. What a family does beyond that (soft caps, other layers) is not known here:
`flatten` then returns None, and the model runs through transformers' own code. A member is proved against that code
at load either way.

Knows weights, the cache's pass and the shapes of layers; does not know sequences, sampling or fusion.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_core.members.attention.base import Pass
from ensemble_core.members.body.base import weight_bytes
from ensemble_core.members.body.linear import Head, Linear, merged
from ensemble_core.members.body.low_rank import AdaptedLinear, LowRanks, Projection, side_by_side
from ensemble_core.members.kernels.base import Activation, Kernels, Norm
from ensemble_core.members.threads import grow

FAMILIES = frozenset(
    f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")
)  # classes of transformers whose layers are those below
# Projections by their path in a layer, as they are merged.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)
_UNKNOWN = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary angles of every position, the sine signed so that the rotated half need not be negated."""

    cos: Tensor  # (L, D)
    sin: Tensor  # (L, D)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine at (N,) positions, (N, 1, D) each."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norms that a family does not have are None."""

    index: int
    kind: int  # which rotation
    num_heads: int
    num_kv_heads: int
    scaling: float
    window: int | None
    before_attention: Norm
    qkv: Projection
    head_norm: Norm | None  # (heads, D) of queries and keys
    output: Projection
    after_attention: Norm | None
    before_mlp: Norm
    gate_up: Projection
    activation: Activation
    down: Projection
    after_mlp: Norm | None
    kernels: Kernels

    def parts(self) -> list[Norm | Projection]:
        """Everything that holds weights."""
        found = (getattr(self, part.name) for part in fields(self))
        return [part for part in found if isinstance(part, Norm | Projection)]

    def adapted(self, adapters: LowRanks) -> Layer:
        """The same layer with what adapters add to its projections. adapters: of this layer."""
        kv_heads = self.num_kv_heads
        return replace(
            self,
            qkv=self._adapted(self.qkv, adapters, _QKV, (self.num_heads, kv_heads, kv_heads)),
            output=self._adapted(self.output, adapters, _OUTPUT, (1,)),
            gate_up=self._adapted(self.gate_up, adapters, _GATE_UP, (1, 1)),
            down=self._adapted(self.down, adapters, _DOWN, (1,)),
        )

    def _adapted(
        self, layer: Projection, adapters: LowRanks, names: Sequence[str], shares: Sequence[int]
    ) -> Projection:
        """names: of the projections that the layer is merged of; shares: of its outputs that each has."""
        parts = [adapters.get(name) for name in names]
        if not any(parts):
            return layer
        assert isinstance(layer, Linear), "a layer is adapted once"
        sizes = [layer.num_out * share // sum(shares) for share in shares]
        return AdaptedLinear(layer, side_by_side(parts, sizes), self.kernels)

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        run: Pass,
        angles: tuple[Tensor, Tensor],
        following: Norm,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x and what this layer's first norm made of it -> the same for the layer that follows, (N, d) each.

        Writes the keys and values of the N tokens. following: the next layer's first norm, or the last of all. at:
        places (M,) at which the layer is asked for more than that; then (M, d) each.
        """
        attended = self.output(self._attention(normed, run, angles, at))
        x = x if at is None else x[at.to(x.device)]
        x, normed = self.kernels.add_and_norm(x, attended, self.after_attention, self.before_mlp)
        changed = self.down(self.kernels.gate(self.gate_up(normed), self.activation))
        return self.kernels.add_and_norm(x, changed, self.after_mlp, following)

    def _attention(self, x: Tensor, run: Pass, angles: tuple[Tensor, Tensor], at: Tensor | None) -> Tensor:
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], num_rotated + self.num_kv_heads, -1)  # (N, H + 2 Hkv, D)
        turned = self.kernels.turn(heads, num_rotated, self.head_norm, *angles)
        query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
        out = run.attend(self.index, query, key, heads[:, num_rotated:], self.scaling, self.window, at)
        return out.flatten(1)


class FlatBody:
    """A whole model; see `base.Body`."""

    def __init__(
        self,
        embedding: nn.Embedding,
        layers: list[Layer],
        rotations: list[Rotation],
        norm: Norm,
        head: Head,
        base: FlatBody | None = None,
    ) -> None:
        """base: whose weights these are, but for those of adapters."""
        self.embedding, self._layers, self._rotations = embedding, layers, rotations
        self._norm, self._head, self._base = norm, head, base
        self._following = [*(layer.before_attention for layer in layers[1:]), norm]

    def __call__(self, run: Pass, token_ids: Tensor, wanted: Tensor) -> Tensor:
        """token_ids: (N,) in the order of the pass; wanted: places that answer. (N_wanted, V) logits."""
        device = self._norm.weight.device
        positions = run.positions.to(device)
        angles = [rotation.at(positions) for rotation in self._rotations]
        x = self.embedding(token_ids.to(device))  # (N, d)
        normed = self._layers[0].before_attention(x)
        *layers, last = zip(self._layers, self._following, strict=True)
        for layer, following in layers:
            grow()
            x, normed = layer.forward(x, normed, run, angles[layer.kind], following)
        layer, following = last
        grow()
        if len(wanted) < len(x):  # what the last layer makes of the others is asked for by nobody
            _, normed = layer.forward(x, normed, run, angles[layer.kind], following, wanted)
            return self._head(normed)
        _, normed = layer.forward(x, normed, run, angles[layer.kind], following)
        return self._head(normed[wanted.to(x.device)])

    def adapted(self, adapters: LowRanks) -> FlatBody:
        """A body with this one's weights and what adapters add to them."""
        layers = [
            layer.adapted(
                {path.removeprefix(at): adapter for path, adapter in adapters.items() if path.startswith(at)}
            )
            for layer in self._layers
            for at in (f"model.layers.{layer.index}.",)
        ]
        return FlatBody(self.embedding, layers, self._rotations, self._norm, self._head, base=self)

    def make_steady(self) -> bool:
        """Whether each token's logits now depend on its own sequence alone, bit for bit, as far as products go."""
        return all(linear.make_steady() for linear in self._linears())

    def num_bytes(self) -> dict[str, int]:
        """See `base.Body`; a head that was tied to the embedding is a copy of its own."""
        shared = {} if self._base is None else self._base.num_bytes()
        return {device: size - shared.get(device, 0) for device, size in self._all_bytes().items()}

    def _all_bytes(self) -> dict[str, int]:
        layers = [part for layer in self._layers for part in layer.parts()]
        tensors = [self.embedding.weight, self._norm.weight, *(t for r in self._rotations for t in (r.cos, r.sin))]
        tensors += [part.weight for part in layers if isinstance(part, Norm)]
        sizes = weight_bytes(tensors)
        linears = sum(linear.num_bytes for linear in self._linears())
        return {device: size + linears for device, size in sizes.items()}

    def _linears(self) -> list[Projection]:
        parts = [part for layer in self._layers for part in layer.parts()]
        return [*self._head.parts, *(part for part in parts if isinstance(part, Projection))]


def flatten(model: Any, max_len: int, kernels: Kernels) -> FlatBody | None:
    """The flat body of a model on one device, or None where its family or a feature of it is not known here.

    The weights of merged layers are taken out of the model, which cannot be used afterwards.
    """
    if not can_flatten(model):
        return None
    decoder = model.model
    kinds = sorted({_kind(layer) for layer in decoder.layers})
    rotations = [_rotation(model, kind, max_len) for kind in kinds]
    layers = [_layer(index, layer, kinds, kernels) for index, layer in enumerate(decoder.layers)]
    return FlatBody(decoder.embed_tokens, layers, rotations, _norm(decoder.norm), _head(model.lm_head, kernels))


def can_flatten(model: Any) -> bool:
    """Whether `flatten` knows the model's family and all its features."""
    config, devices = model.config, {parameter.device for parameter in model.parameters()}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if type(model).__name__ not in FAMILIES or len(devices) > 1 or hooked:
        return False
    if any(getattr(config, name, None) for name in _UNKNOWN):
        return False
    projections = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return all(type(module) is nn.Linear for module in projections) and _rotates_whole_heads(model)


def _rotates_whole_heads(model: Any) -> bool:
    attention = model.model.layers[0].self_attn
    probe = torch.zeros(1, 1, device=model.device, dtype=torch.long)
    return bool(_angles(model, _kind(model.model.layers[0]), probe)[0].shape[-1] == attention.head_dim)


def _kind(layer: nn.Module) -> str:
    """Families with several rotations name them by the type of layer."""
    return str(getattr(layer.self_attn, "layer_type", None) or "")


def _angles(model: Any, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1, N, D) of (1, N) positions, as the model itself makes them."""
    rotary = model.model.rotary_emb
    like = torch.empty(0, dtype=model.dtype, device=positions.device)
    named = "layer_type" in inspect.signature(type(rotary).forward).parameters
    cos, sin = rotary(like, positions, kind) if named else rotary(like, positions)
    return cos, sin


def _rotation(model: Any, kind: str, max_len: int) -> Rotation:
    cos, sin = _angles(model, kind, torch.arange(max_len, device=model.device).unsqueeze(0))
    signed = torch.cat((-sin[0, :, : sin.shape[2] // 2], sin[0, :, sin.shape[2] // 2 :]), dim=-1)
    return Rotation(cos[0], signed)


def _head(module: nn.Linear, kernels: Kernels) -> Head:
    return Head(module.weight.data, None if module.bias is None else module.bias.data, kernels)


def _norm(module: Any) -> Norm:
    """Gemma's norms store their weight less one."""
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return Norm(module.weight.detach().float() + offset, epsilon)


def _head_norm(attention: Any, num_heads: int, num_kv_heads: int) -> Norm | None:
    """One norm for the heads of queries and of keys."""
    if not hasattr(attention, "q_norm"):
        return None
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    weight = torch.cat([query.weight.expand(num_heads, -1), key.weight.expand(num_kv_heads, -1)])
    return Norm(weight.contiguous(), query.epsilon)


def _layer(index: int, layer: Any, kinds: list[str], kernels: Kernels) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    num_heads = attention.q_proj.out_features // attention.head_dim
    num_kv_heads = attention.k_proj.out_features // attention.head_dim
    around_mlp = hasattr(layer, "pre_feedforward_layernorm")  # Gemma has norms on both sides
    after = _norm(layer.post_attention_layernorm)
    return Layer(
        index=index,
        kind=kinds.index(_kind(layer)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        scaling=attention.scaling,
        window=getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        before_attention=_norm(layer.input_layernorm),
        qkv=_taken(kernels, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm=_head_norm(attention, num_heads, num_kv_heads),
        output=_taken(kernels, attention.o_proj),
        after_attention=after if around_mlp else None,
        before_mlp=_norm(layer.pre_feedforward_layernorm) if around_mlp else after,
        gate_up=_taken(kernels, mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=_taken(kernels, mlp.down_proj),
        after_mlp=_norm(layer.post_feedforward_layernorm) if around_mlp else None,
        kernels=kernels,
    )


def _taken(kernels: Kernels, *layers: nn.Linear) -> Linear:
    """The layers as one; their own weights are given up, so that a model is never in memory twice."""
    packed = merged(*layers, kernels=kernels)
    if packed.copied or len(layers) > 1:
        for layer in layers:
            layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    return packed

"""Two members of 7-8B on one GPU, randomly initialised: a lockstep step against its floor and against transformers.

    python -m benchmarks.gpu [--batch 1 8 64] [--length 1024] [--quick]

Vocabularies of 32,768 and 128,256 tokens that share the first 32,768, so that the smaller one's texts are spelt by
both; fused by `projection`. For each batch of B sequences with a context of L tokens:

step            the engine's whole step: both forwards on streams of their own, fusion, sampling, text
forwards        the sum of what both forwards took on the device; they overlap, so it may be more than the step
floor           bytes that the step must read (weights but for the tables of embeddings; cached keys and values) over
                the bandwidth of a copy on this device, which is measured first
transformers    the sum of both models' own forwards, one after the other, with a DynamicCache; logits alone

Milliseconds are medians. Where there is no CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.ledger import Findings, Value, arguments
from benchmarks.recorder import SETTLING, StepRecorder
from ensemble_core.decoding.capacity import Limits
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.sequence import Sequence
from ensemble_core.engine import Engine
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.projection import ProjectionFusion, ProjectionOptions
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.loading.models import make_member
from ensemble_core.members.local import LocalMember
from ensemble_core.text.alignment import Track
from ensemble_core.text.vocabulary import Vocabulary

NUM_CANDIDATES = 256
NO_DEVICE = "no CUDA device: nothing is measured"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama."""

    name: str
    vocabulary: int
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14_336


SHAPES = (Shape("7B, 32k", 32_768), Shape("8B, 128k", 128_256))


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What is measured, where."""

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    batches: tuple[int, ...]
    length: int  # L, tokens of context around which steps are measured
    steps: int
    copied: int  # bytes of the copy that measures bandwidth


def measure(plan: GpuPlan) -> tuple[list[dict[str, Value]], float]:
    """A row for each batch, and the bandwidth in bytes a second."""
    bandwidth = copy_bandwidth(plan)
    members: dict[str, LocalMember] = {}
    own = dict.fromkeys(plan.batches, 0.0)
    weights = token_bytes = 0
    for shape in plan.shapes:
        model = build(shape, plan)
        weights += read_bytes(model)
        token_bytes += 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads) * plan.dtype.itemsize
        for batch in plan.batches:
            own[batch] += own_seconds(model, batch, plan)
        members[shape.name] = as_member(shape, model, plan)
    bench = PairBench(members, plan)
    rows: list[dict[str, Value]] = []
    for batch in plan.batches:
        step, forwards = bench.step_seconds(batch)
        floor = (weights + batch * plan.length * token_bytes) / bandwidth
        rows.append(row(batch, plan.length, step, forwards, floor, own[batch]))
    bench.close()
    return rows, bandwidth


def row(batch: int, length: int, step: float, forwards: float, floor: float, own: float) -> dict[str, Value]:
    """Of the table; seconds in, milliseconds out."""
    return {
        "B": batch,
        "L": length,
        "step ms": 1e3 * step,
        "forwards ms": 1e3 * forwards,
        "floor ms": 1e3 * floor,
        "step / floor": step / floor,
        "transformers ms": 1e3 * own,
        "step / transformers": step / own,
    }


def copy_bandwidth(plan: GpuPlan) -> float:
    """Bytes read and written in a second by a copy on the device."""
    source = torch.ones(plan.copied, dtype=torch.uint8, device=plan.device)
    goal = torch.empty_like(source)
    return 2 * plan.copied / median(timed(lambda: goal.copy_(source), plan))


def read_bytes(model: Any) -> int:
    """Weights that a decode step reads: all but the table of embeddings, which gives a row a token."""
    table = model.get_input_embeddings().weight
    sizes = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    if model.get_output_embeddings().weight is not table:
        del sizes[id(table)]
    return sum(sizes.values())


def timed(run: Callable[[], object], plan: GpuPlan, before: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of `plan.steps` runs, each to the device's end, after some that do not count."""
    seconds = []
    for turn in range(-SETTLING, plan.steps):
        if before is not None:
            before()
        wait(plan.device)
        started = time.perf_counter()
        run()
        wait(plan.device)
        if turn >= 0:
            seconds.append(time.perf_counter() - started)
    return seconds


def wait(device: torch.device) -> None:
    """For all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(shape: Shape, plan: GpuPlan) -> Any:
    """A model with random weights, made where it will run."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=plan.length + 1024,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(plan.dtype)
    try:
        with torch.device(plan.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def own_seconds(model: Any, batch: int, plan: GpuPlan) -> float:
    """The model's own forward of one new token for each of B rows that hold L: the median."""
    cache = DynamicCache(config=model.config)
    ids = torch.randint(1, 1000, (1, plan.length), device=plan.device) % model.config.vocab_size
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    kept = [dict(vars(layer)) for layer in cache.layers]
    new = ids[:, -1:].repeat(batch, 1)

    def restore() -> None:
        for layer, state in zip(cache.layers, kept, strict=True):
            vars(layer).update(state)

    return median(timed(lambda: model(new, past_key_values=cache, logits_to_keep=1), plan, restore))


def words(size: int) -> Vocabulary:
    """Token i is the word ` i`; two of these agree on what the smaller one has."""
    tokens = [b"</s>", *(f" {i}".encode() for i in range(1, size))]
    return Vocabulary(tokens, frozenset({0}), frozenset({0}), lambda text: [int(word) for word in text.split()])


def as_member(shape: Shape, model: Any, plan: GpuPlan) -> LocalMember:
    """The model as a member with a paged cache for the largest batch; its weights are taken over."""
    batch, longest = max(plan.batches), plan.length + plan.steps + 64
    head = shape.hidden // shape.heads
    page = 256 if plan.device.type == "cuda" else 16
    pages = batch * -(-longest // page) + 1
    size = pages * page * 2 * shape.layers * shape.kv_heads * head * plan.dtype.itemsize
    config = MemberConfig(
        model=shape.name, kv_memory=max(size, 2**20), max_len=longest, kv_cache="paged", device=str(plan.device)
    )
    return make_member(shape.name, model, words(shape.vocabulary), config, max_batch=batch)


class PairBench:
    """An engine over the members; the one with the smaller vocabulary is main."""

    def __init__(self, members: dict[str, LocalMember], plan: GpuPlan) -> None:
        self._members, self._plan, self._recorder = members, plan, StepRecorder()
        names = sorted(members, key=lambda name: len(members[name].vocabulary))
        vocabularies = [members[name].vocabulary for name in names]
        space = FusionSpace(vocabularies, list, members[names[0]].device, tuple(names))
        fusion = ProjectionFusion(space, ProjectionOptions())
        self._recipe = Recipe("pair", tuple(names), (1 / len(names),) * len(names), fusion, "projection")
        limits = Limits(max_running=max(plan.batches), max_waiting=max(plan.batches), token_budget=4096)
        self._engine = Engine(members, limits, NUM_CANDIDATES, self._recorder.record, prefix_reuse=False)

    def step_seconds(self, batch: int) -> tuple[float, float]:
        """Medians of whole decode steps of B sequences, and of the sum of their forwards."""
        requests = [self._request(i) for i in range(batch)]
        self._recorder.steps.clear()
        self._engine.add(requests)
        while len(steps := self._decoding(batch)) < SETTLING + self._plan.steps:
            self._engine.step()
        self._engine.abort([request.seq_id for request in requests])
        steps = steps[SETTLING:]
        return median(told.stats.seconds for told in steps), median(told.forward_seconds for told in steps)

    def close(self) -> None:
        """End the engine's threads."""
        self._engine.close()

    def _decoding(self, batch: int) -> list[Any]:
        told = (told for told in self._recorder.steps if told.stats.batch_size == batch)
        return [t for t in told if all(member.phase == "decode" for member in t.stats.members)]

    def _request(self, row_index: int) -> Sequence:
        length = self._plan.length - SETTLING - self._plan.steps // 2
        ids = [1 + (37 * row_index + i) % 250 for i in range(length)]
        params = SamplingParams(max_tokens=self._plan.steps + 48, ignore_eos=True, temperature=0.0)
        request = GenerationRequest(f"row-{row_index}", "pair", tuple(ids), params)
        tracks = {name: Track(self._members[name].vocabulary, list(ids)) for name in self._recipe.members}
        return Sequence(row_index, request, self._recipe, tracks)


def main() -> None:
    """Measure on the first GPU, if there is one."""
    parser = arguments(__doc__, config=False)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return
    steps, batches = (4, args.batch[:2]) if args.quick else (args.steps, args.batch)
    plan = GpuPlan(
        torch.device("cuda:0"), torch.bfloat16, SHAPES, tuple(batches), args.length, steps, copied=2**30
    )
    rows, bandwidth = measure(plan)
    settings = {
        "gpu": torch.cuda.get_device_name(plan.device),
        "copy GB/s": round(bandwidth / 1e9, 1),
        "steps": steps,
        "quick": args.quick,
    }
    Findings("gpu", {"steps": rows}, settings=settings).print()


if __name__ == "__main__":
    main()

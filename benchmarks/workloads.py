"""Work whose cost may grow with the text, with the number of sequences or with the number of members.

Each function makes one kind of work at a given size and returns a sample: call it, and it does the work once more and
says what that took, in milliseconds of CPU time of the calling thread: the work runs in that thread alone, and what
else the machine does hardly disturbs it. Loading and preparing are outside that time, and so is a model's forward.
Models are tiny or absent; where spelling counts, the tokenizers are those of the demo pair. Knows no bounds and no
tables.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks import prose
from benchmarks.gpu import GpuPlan, Shape, build, words
from ensemble_core.admission import Admission
from ensemble_core.config_file import load_config
from ensemble_core.decoding.capacity import Capacity, Limits
from ensemble_core.decoding.guidance import Grammars
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.decoding.requests import GenerationRequest
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.decoding.scheduler import Scheduler
from ensemble_core.decoding.sequence import Choice, Sequence
from ensemble_core.decoding.shaping import shape
from ensemble_core.engine import Engine
from ensemble_core.factory import load_recipes
from ensemble_core.fusion.base import FUSIONS, Fused, FusionSpace, build_fusion
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.answering import answer, lay_out
from ensemble_core.members.base import Candidates, Feed, log_rest
from ensemble_core.members.kernels.choice import choose
from ensemble_core.members.loading.checkpoints import load_tokenizer, load_vocabulary
from ensemble_core.members.loading.models import make_member
from ensemble_core.members.local import LocalMember
from ensemble_core.speakers import Speaker
from ensemble_core.stats import discard
from ensemble_core.text.alignment import Track
from ensemble_core.text.detokenizer import Detokenizer
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.vocabulary import Vocabulary

Sample = Callable[[], float]  # does the work once; CPU milliseconds of this thread

NUM_KEPT = 24  # prefixes that each member keeps of earlier prompts
NUM_ROWS = 32
NUM_CANDIDATES = 256
NUM_WORDS = 32_768
CHUNK = 512
PIECE = 5  # characters of a token

_PHRASES = (
    "今天天气很好",
    "我们去公园散步",
    "她在图书馆看书",
    "这家饭馆的面条很好吃",
    "请问火车站怎么走",
    "他学习计算机科学",
    "昨天晚上下了一场大雨",
    "孩子们在院子里玩耍",
    "科学家发现了新的方法",
    "价格比去年高百分之三",
)


def timed(work: Callable[[], object], times: int = 1) -> float:
    """CPU milliseconds of one call, the mean of `times` calls in a row."""
    started = time.thread_time()
    for _ in range(times):
        work()
    return 1e3 * (time.thread_time() - started) / times


def prefix_search(num_prompts: int, length: int) -> Sample:
    """Waiting prompts of `length` tokens beside kept prefixes as long: what the search for prefixes adds to a step.

    Two engines of two tiny members take a step each, of one prompt token: one searches for prefixes, one does not.
    The difference is a sample, so the forwards and the rest of the step cancel out.
    """
    searching, plain = (Crowd(num_prompts, length, prefix_reuse=reuse) for reuse in (True, False))
    return lambda: searching.step() - plain.step()


class Crowd:
    """An engine that has admitted all its prompts and reads them token by token, so that most stay untouched."""

    def __init__(self, num_prompts: int, length: int, *, prefix_reuse: bool) -> None:
        names = ("alpha", "beta")
        members = {name: _tiny_member(name, length, num_prompts + NUM_KEPT + 1) for name in names}
        for member in members.values():
            _keep_prefixes(member, length)
        limits = Limits(num_prompts, num_prompts, token_budget=1)
        self.engine = Engine(members, limits, 16, discard, prefix_reuse=prefix_reuse)
        space = FusionSpace([members[name].vocabulary for name in names], list, torch.device("cpu"), names)
        fusion = build_fusion("projection", FUSIONS.parse("projection", {}, "fusion"), space)
        recipe = Recipe("pair", names, (0.5, 0.5), fusion, "projection")
        vocabularies = {name: members[name].vocabulary for name in names}
        self.engine.add(
            [_sequence(i, ids_of(NUM_KEPT + i, length), recipe, vocabularies) for i in range(num_prompts)]
        )
        self.engine.step()  # admits all of them

    def step(self) -> float:
        """CPU milliseconds of one step."""
        return timed(self.engine.step)


def _tiny_member(name: str, length: int, num_rows: int) -> LocalMember:
    """A random Llama of one layer with a row for every prompt and prefix."""
    tiny = Shape(name, 300, hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16)
    model = build(tiny, GpuPlan(torch.device("cpu"), torch.float32, (tiny,), (1,), length, steps=1, copied=1))
    max_len = length + 8
    memory = max(num_rows * max_len * 2 * 8 * 4, 2**20)
    config = MemberConfig(model=name, kv_memory=memory, max_len=max_len, kv_cache="rows", device="cpu")
    return make_member(name, model, words(tiny.vocabulary), config)


def _keep_prefixes(member: LocalMember, length: int) -> None:
    for number in range(NUM_KEPT):
        ids, seq_id = ids_of(number, max(length, 16)), -1 - number  # a shorter prefix is not kept
        for start in range(0, length, CHUNK):
            member.forward([Feed(seq_id, ids[start : start + CHUNK], wanted=0)])
        member.release(seq_id, keep=True)


def ids_of(seed: int, length: int) -> list[int]:
    """Random ids of the tiny members."""
    draw = random.Random(seed)
    return [draw.randrange(1, 300) for _ in range(length)]


def _sequence(
    seq_id: int,
    prompt_ids: list[int],
    recipe: Recipe,
    vocabularies: dict[str, Vocabulary],
    params: SamplingParams | None = None,
) -> Sequence:
    """A request whose prompt has the same ids in every member."""
    request = GenerationRequest(
        f"request-{seq_id}", recipe.model, tuple(prompt_ids), params or SamplingParams(max_tokens=4)
    )
    tracks = {name: Track(vocabularies[name], list(prompt_ids)) for name in recipe.members}
    return Sequence(seq_id, request, recipe, tracks)


def respelling(config: Path, member: str, text: str, num_chars: int) -> Sample:
    """An assistant respells a text that has grown by a character: one sequence, one step."""
    vocabulary = _demo_vocabulary(config, member)
    track = Track(vocabulary, [0])
    at = num_chars

    def sample() -> float:
        nonlocal at
        at += 1
        grown = text[:at]
        track.num_cached = len(track)
        return timed(lambda: track.respell(grown))

    track.respell(text[:at])
    return sample


@cache
def _demo_vocabulary(config: Path, member: str) -> Vocabulary:
    return load_vocabulary(member, load_config(config).members[member])


def chinese(num_chars: int) -> str:
    """Chinese without spaces: everyday phrases in random order."""
    draw, text = random.Random(1), ""
    while len(text) < num_chars:
        text += draw.choice(_PHRASES) + draw.choice("，。；、")
    return text[:num_chars]


def minified_json(num_chars: int) -> str:
    """An array of records without a space."""
    draw = random.Random(2)
    records: list[dict[str, object]] = []
    while len(text := json.dumps(records, separators=(",", ":"))) < num_chars:
        for _ in range(50):
            name = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8))
            records.append(
                {"id": draw.randrange(10**6), "name": name, "tags": ["a1", "b2"], "price": draw.random()}
            )
    return text[:num_chars]


def one_letter(num_chars: int) -> str:
    """Where every place looks like every other."""
    return "哈" * num_chars


def choices(config: Path, num: int, num_chars: int) -> Sample:
    """Admission of one request for `num` choices of a prompt, over the demo pair's tokenizers."""
    admission, model = _demo_admission(config)
    draw = iter(range(10**9))
    text = prose.sentences(0, num_chars // 40)[:num_chars]

    def sample() -> float:
        seed = next(draw)
        params = SamplingParams(max_tokens=16, seed=seed)
        prompt = f"{seed} {text}"  # nobody has seen it
        group = f"group-{seed}"
        requests = [GenerationRequest(f"{group}-{i}", model, prompt, params, group=group) for i in range(num)]
        return timed(lambda: admission.admit_all(requests))

    return sample


@cache
def _demo_admission(path: Path) -> tuple[Admission, str]:
    config = load_config(path)
    book, vocabularies = load_recipes(config)
    speakers = {
        name: Speaker(
            vocabulary, PromptEncoder(name, load_tokenizer(name, config.members[name])), 8192, Grammars(vocabulary)
        )
        for name, vocabulary in vocabularies.items()
    }
    return Admission(book, speakers), next(iter(config.ensembles))


def admit(num: int) -> Sample:
    """`Scheduler.admit` lets `num` waiting sequences of two members in, all at once."""
    vocabulary = words(300)
    recipe = Recipe("pair", ("alpha", "beta"), (0.5, 0.5), None, "single")
    vocabularies = dict.fromkeys(recipe.members, vocabulary)
    capacities = {name: Capacity(page_size=16, num_pages=16 * num, max_len=256) for name in recipe.members}

    def sample() -> float:
        scheduler = Scheduler(capacities, Limits(num, num, token_budget=512))
        scheduler.add([_sequence(i, [1] * 9, recipe, vocabularies) for i in range(num)])
        return timed(scheduler.admit)

    return sample


def candidates(vocabulary: int, constrained: bool) -> Sample:
    """Candidates of 32 rows of bf16 logits, as fusion gets them. constrained: one row needs its whole."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, vocabulary, generator=generator).mul_(3).bfloat16()

    widths = [vocabulary if constrained else NUM_CANDIDATES, *[NUM_CANDIDATES] * (NUM_ROWS - 1)]
    feeds = [Feed(i, [0], top_k=width) for i, width in enumerate(widths)]
    groups = (range(1), range(1, NUM_ROWS)) if constrained else (range(NUM_ROWS),)
    kernels = choose([logits.device], logits.dtype)

    def work() -> list[Candidates]:
        answers = answer(logits, feeds, lay_out(feeds), kernels)
        return [answers.last(group).best(NUM_CANDIDATES) for group in groups]

    return lambda: timed(work)


def penalties(num_tokens: int) -> Sample:
    """Penalties over `num_tokens` tokens of 32 sequences, half of them prompt, half completion."""
    vocabulary = words(NUM_WORDS)
    recipe = Recipe("one", ("alpha",), (1.0,), None, "single")
    params = SamplingParams(
        max_tokens=10**6,
        ignore_eos=True,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
    )
    draw = random.Random(0)
    ids = [draw.randrange(1, NUM_WORDS) for _ in range(num_tokens // 2)]
    sequences = [_sequence(i, ids, recipe, {"alpha": vocabulary}, params) for i in range(NUM_ROWS)]
    for token_id in ids:
        _extend(sequences, token_id)
    part = _answers(words(NUM_WORDS), seed=1)
    fused = Fused(part.token_ids, part.logprobs, part.tail, torch.zeros(NUM_ROWS, 1))

    def sample() -> float:
        _extend(sequences, draw.randrange(1, NUM_WORDS))
        return timed(lambda: shape(fused, sequences, [None] * NUM_ROWS))

    return sample


def _extend(sequences: list[Sequence], token_id: int) -> None:
    for sequence in sequences:
        sequence.decide([Choice(token_id)])


def stop_strings(length: int, *, nearly: bool) -> Sample:
    """One token of text through 16 stop strings of `length` characters. nearly: each is always nearly complete."""
    stops, text = _strings(length, nearly)
    detokenizer = Detokenizer(stops)
    detokenizer.feed(text[: 2 * length].encode())
    pieces = (text[at : at + PIECE].encode() for at in range(2 * length, len(text), PIECE))
    return lambda: timed(lambda: detokenizer.feed(next(pieces)), 16)


def _strings(length: int, nearly: bool) -> tuple[list[str], str]:
    """Stop strings, and a text in which none of them comes."""
    if nearly:
        return ["a" * (length - 1 - i) + "b" for i in range(16)], "a" * 50_000
    stops = [f"{i:x}" + prose.sentences(i, length // 20)[: length - 1] for i in range(16)]
    return stops, prose.sentences(99, 1000)


def fusion(name: str, num_members: int) -> Sample:
    """One fusion of 32 rows of 256 candidates of so many members, whose vocabularies share three quarters."""
    vocabularies = _vocabularies()[:num_members]
    space = FusionSpace(vocabularies, list, torch.device("cpu"), tuple(f"member-{i}" for i in range(num_members)))
    built = build_fusion(name, FUSIONS.parse(name, {}, "fusion"), space)
    parts = [_answers(vocabulary, seed) for seed, vocabulary in enumerate(vocabularies)]
    weights = torch.full((NUM_ROWS, num_members), 1 / num_members)
    return lambda: timed(lambda: built.fuse(parts, weights))


@cache
def _vocabularies() -> list[Vocabulary]:
    """Eight: all bytes, and words of which three quarters are in all of them, each with ids of its own."""
    shared = [f" {i}".encode() for i in range(NUM_WORDS * 3 // 4)]
    found = []
    for member in range(8):
        tokens = shared + [f" {i}/{member}".encode() for i in range(NUM_WORDS - len(shared))]
        random.Random(member).shuffle(tokens)
        tokens = [b"</s>", *(bytes([byte]) for byte in range(256)), *tokens]
        found.append(Vocabulary(tokens, frozenset({0}), frozenset({0}), lambda text: list(text.encode())))
    return found


def _answers(vocabulary: Vocabulary, seed: int) -> Candidates:
    """Candidates of 32 rows: the members' likeliest tokens are drawn from the same words, as real ones agree."""
    generator = torch.Generator().manual_seed(seed)
    likely = sorted(range(len(vocabulary)), key=lambda i: _rank(vocabulary.tokens[i]))[: 2 * NUM_CANDIDATES]
    places = torch.rand(NUM_ROWS, len(likely), generator=generator).argsort(dim=1)[:, :NUM_CANDIDATES]
    logits = torch.randn(NUM_ROWS, NUM_CANDIDATES + 1, generator=generator).mul_(3)
    logprobs = logits.log_softmax(dim=1)[:, :NUM_CANDIDATES].sort(dim=1, descending=True).values
    return Candidates(torch.tensor(likely)[places], logprobs, log_rest(logprobs))


def _rank(token: bytes) -> tuple[bool, int]:
    """Words of all members first, one in eight of them a member's own."""
    text = token[1:].split(b"/")
    if not token.startswith(b" ") or not text[0].isdigit():
        return True, 0
    return False, int(text[0]) * (8 if len(text) > 1 else 1)

"""A local member answers exactly as its model does, whatever else is in the pass; what cannot is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import KINDS, Kind
from torch import Tensor
from transformers import AutoModelForCausalLM

from ensemble_core.errors import MemberError
from ensemble_core.member_config import MemberConfig
from ensemble_core.members.base import Feed, ask
from ensemble_core.members.body.flat import FlatBody
from ensemble_core.members.body.graphs import GraphedBody, eagerly
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.loading.checkpoints import load_vocabulary
from ensemble_core.members.loading.models import load_member
from ensemble_core.members.local import LocalMember

EXACT = {"atol": 2e-5, "rtol": 1e-5}
WHOLE = 10_000  # candidates: more than any tiny vocabulary has
each_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(folder: Path, **options: Any) -> MemberConfig:
    settings = {"dtype": "float32", "device": "cpu", "kv_memory": "4MiB", "max_len": 160} | options
    return MemberConfig(model=str(folder), **settings)


def load(folder: Path, name: str = "tiny", **options: Any) -> LocalMember:
    config = config_of(folder, **options)
    return load_member(name, config, folder, load_vocabulary(name, config))


WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "transformers": {"forward": "transformers"},
    "paged": {"kv_cache": "paged"},
    "graphs": {"kv_cache": "paged"},
}


@pytest.fixture(scope="module", params=WAYS)
def loaded(tiny_checkpoints: dict[Kind, Path], request: pytest.FixtureRequest) -> dict[Kind, LocalMember]:
    """Every kind through its flat layers, where it has them, through transformers' own code, and over pages.

    graphs: decode steps through the buffers of CUDA graphs, with nothing captured.
    """
    options, capture = WAYS[request.param], eagerly if request.param == "graphs" else None
    made = {}
    for kind, folder in tiny_checkpoints.items():
        config = config_of(folder, **options)
        made[kind] = load_member(kind, config, folder, load_vocabulary(kind, config), max_batch=8, capture=capture)
        assert isinstance(made[kind]._body, GraphedBody) is (capture is not None)
    return made


@pytest.fixture(scope="module")
def originals(tiny_checkpoints: dict[Kind, Path]) -> dict[Kind, Any]:
    """The same checkpoints as transformers runs them."""
    return {
        kind: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        for kind, folder in tiny_checkpoints.items()
    }


@pytest.fixture
def member(kind: Kind, loaded: dict[Kind, LocalMember]) -> Iterator[LocalMember]:
    """A member that must be empty again after the test."""
    yield loaded[kind]
    for seq_id in range(1000):
        loaded[kind].release(seq_id)
    loaded[kind].check_cache()
    assert loaded[kind].free_pages == loaded[kind].num_pages


@pytest.fixture
def original(kind: Kind, originals: dict[Kind, Any]) -> Any:
    return originals[kind]


def random_ids(member: LocalMember, count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, len(member.vocabulary) - 3) for _ in range(count)]


def greedy(original: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    out = original.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def own_logprobs(original: Any, ids: list[int]) -> Tensor:
    """(T, V): the model's own, uncached."""
    logits = original(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=1)  # type: ignore[no-any-return]


def assert_own(found: Tensor, original: Any, ids: list[int]) -> None:
    """The last positions of a text, (N, V), are the model's own in float64, up to float32's rounding.

    What that does to this model and text is measured on its own float32 forward: on processors with narrow vectors,
    whose long sums round otherwise, it is up to 7e-5 for some texts and 1e-6 for most.
    """
    exact = own_logprobs(copy.deepcopy(original).double(), ids)[-len(found) :]
    rounding = float((own_logprobs(original, ids)[-len(found) :] - exact).abs().max())
    torch.testing.assert_close(found, exact, rtol=EXACT["rtol"], atol=EXACT["atol"] + 2 * rounding)


def whole(member: LocalMember, feeds: list[Feed]) -> Tensor:
    """(N, V) log-probabilities of every wanted position."""
    return ask(member, feeds, WHOLE).logprobs


def test_known_families_are_flat(loaded: dict[Kind, LocalMember], request: pytest.FixtureRequest) -> None:
    bodies = {kind: getattr(member._body, "_body", member._body) for kind, member in loaded.items()}
    flat = {kind for kind, body in bodies.items() if isinstance(body, FlatBody)}
    assert flat == (set() if "transformers" in request.node.name else {"llama", "gemma3", "qwen3"})


def fragment(member: LocalMember, first: int = 50) -> None:
    """Hold every second of the low rows, so that new sequences lie apart."""
    for seq_id in range(first, first + 10):
        ask(member, [Feed(seq_id, [5, 6, 7], 0)], 1)
    for seq_id in range(first, first + 10, 2):
        member.release(seq_id)


@each_kind
def test_greedy_alone_is_generate(member: LocalMember, original: Any) -> None:
    prompt = random_ids(member, 11, seed=1)
    feed, found = prompt, []
    for _ in range(64):
        feed = [int(ask(member, [Feed(1, feed)], 4).token_ids[0, 0])]
        found += feed
    assert found == greedy(original, prompt, 64)


@each_kind
def test_greedy_in_a_changing_batch_is_generate(member: LocalMember, original: Any) -> None:
    """Twelve sequences of many lengths, at most eight at a time; one joins as soon as one leaves."""
    prompts = {seq: random_ids(member, 3 + 7 * seq, seed=seq) for seq in range(12)}
    lengths = {seq: 64 if seq % 3 == 0 else 9 + seq for seq in prompts}
    feeds: dict[int, list[int]] = {}
    found: dict[int, list[int]] = {seq: [] for seq in prompts}
    waiting = list(prompts)
    sizes = []
    while waiting or feeds:
        while waiting and len(feeds) < 8:
            seq = waiting.pop(0)
            feeds[seq] = prompts[seq]
        sizes.append(len(feeds))
        answer = ask(member, [Feed(seq, ids) for seq, ids in feeds.items()], 4)
        for seq, token in zip(list(feeds), answer.token_ids[:, 0].tolist(), strict=True):
            found[seq].append(token)
            feeds[seq] = [token]
            if len(found[seq]) == lengths[seq]:
                del feeds[seq]
                member.release(seq)
    assert max(sizes) == 8
    assert found == {seq: greedy(original, prompts[seq], lengths[seq]) for seq in prompts}


@each_kind
@pytest.mark.parametrize("seed", range(4))
def test_one_pass_is_many_passes(member: LocalMember, original: Any, seed: int) -> None:
    """Prefill chunks, decode and verification mixed, rows apart: every answer is the model's own, uncached."""
    rng = random.Random(seed)
    fragment(member)
    texts = {seq: random_ids(member, 140, seed=10 * seed + seq) for seq in range(9)}
    done = {seq: rng.choice([0, 0, 5, 30, rng.randint(1, 60)]) for seq in texts}
    for seq, length in done.items():
        if length:
            ask(member, [Feed(seq, texts[seq][:length], 0)], 1)
    for _ in range(5):
        feeds, expected = [], []
        for seq in rng.sample(sorted(texts), rng.randint(2, 9)):
            count = rng.choice([1, 1, 4, 5, rng.randint(1, 15)])
            wanted = rng.choice([0, 1, count])
            begin, end = done[seq], done[seq] + count
            feeds.append(Feed(seq, texts[seq][begin:end], wanted))
            expected.append(own_logprobs(original, texts[seq][:end])[end - wanted :])
            done[seq] = end
        torch.testing.assert_close(whole(member, feeds), torch.cat(expected), **EXACT)
    member.check_cache()


@each_kind
def test_together_is_apart(member: LocalMember) -> None:
    """The same feeds through the same member, in one pass and one by one."""
    fragment(member)
    texts = {seq: random_ids(member, 90, seed=seq) for seq in range(6)}
    cuts = {0: (0, 40), 1: (50, 51), 2: (33, 38), 3: (51, 52), 4: (7, 8), 5: (60, 90)}

    def feeds(offset: int) -> list[Feed]:
        return [Feed(seq + offset, texts[seq][a:b], b - a) for seq, (a, b) in cuts.items()]

    for seq, (begin, _) in cuts.items():
        for offset in (0, 20):
            if begin:
                ask(member, [Feed(seq + offset, texts[seq][:begin], 0)], 1)
    together = whole(member, feeds(0))
    apart = torch.cat([whole(member, [feed]) for feed in feeds(20)])
    torch.testing.assert_close(together, apart, **EXACT)


@each_kind
@pytest.mark.parametrize("chunks", [[50], [1] * 50, [49, 1], [1, 49], [8, 8, 8, 8, 8, 8, 2], [7, 9, 1, 20, 13]])
def test_any_cut_of_a_prefill_is_the_whole(member: LocalMember, original: Any, chunks: list[int]) -> None:
    ids, parts, start = random_ids(member, 50, seed=3), [], 0
    for count in chunks:
        parts.append(whole(member, [Feed(1, ids[start : start + count], count)]))
        start += count
    torch.testing.assert_close(torch.cat(parts), own_logprobs(original, ids), **EXACT)


@each_kind
@pytest.mark.parametrize("kept", [0, 1, 20, 37, 59, 60])
def test_rollback_is_a_fresh_prefill(member: LocalMember, original: Any, kept: int) -> None:
    """Far past Gemma 3's window of 8, back to before it and within it, then other tokens."""
    ids, other = random_ids(member, 60, seed=4), random_ids(member, 30, seed=5)
    ask(member, [Feed(1, ids, 0), Feed(2, ids[:50], 0)], 1)
    first = whole(member, [Feed(1, other[:9], 9, keep=kept), Feed(2, [5])])[:9]
    rest = whole(member, [Feed(1, other[9:], 21)])
    assert_own(torch.cat([first, rest]), original, ids[:kept] + other)
    member.check_cache()


@each_kind
def test_rows_follow_feeds_and_positions(member: LocalMember, original: Any) -> None:
    """Long feeds stand last in the pass, not in the answer."""
    texts = {seq: random_ids(member, 20, seed=seq) for seq in range(4)}
    feeds = [Feed(3, texts[3][:9], 3), Feed(0, texts[0][:2], 2), Feed(2, texts[2][:6], 0), Feed(1, texts[1][:4])]
    found = ask(member, feeds, 5)
    own = [own_logprobs(original, feed.token_ids)[len(feed.token_ids) - feed.wanted :] for feed in feeds]
    best = torch.cat(own).topk(5, dim=1)
    assert len(found) == 6
    assert torch.equal(found.token_ids, best.indices)
    torch.testing.assert_close(found.logprobs, best.values, **EXACT)


@each_kind
def test_ids_asked_for_are_in_their_own_row(member: LocalMember, original: Any) -> None:
    left, right = random_ids(member, 7, seed=8), random_ids(member, 3, seed=9)
    own = torch.cat([own_logprobs(original, left)[5:], own_logprobs(original, right)[2:]])
    least = own.argmin(dim=1).tolist()
    also = ((least[0],), ())
    found = ask(member, [Feed(1, left, 2, also), Feed(2, right, 1, ((least[2],),))], 6)
    assert [row[-1] == asked for row, asked in zip(found.token_ids.tolist(), least, strict=True)] == [
        True,
        False,
        True,
    ]
    torch.testing.assert_close(found.logprobs, own.gather(1, found.token_ids), **EXACT)


@each_kind
def test_a_failed_forward_advances_nothing(
    member: LocalMember, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after all layers have written; then the same feeds go through."""
    ids = random_ids(member, 30, seed=6)
    ask(member, [Feed(1, ids[:20], 0)], 1)
    feeds = [Feed(1, ids[20:], 10), Feed(2, ids[:10], 10)]
    body = member._body
    with monkeypatch.context() as patch:
        patch.setattr(member, "_body", lambda *pass_: failing(body(*pass_)))
        with pytest.raises(
            MemberError, match=f"member '{member.name}': forward failed: RuntimeError: out of luck"
        ):
            ask(member, feeds, 3)
    assert [member._cache.length(seq) for seq in (1, 2)] == [20, 0]
    member.check_cache()
    expected = torch.cat([own_logprobs(original, ids)[20:], own_logprobs(original, ids[:10])])
    torch.testing.assert_close(whole(member, feeds), expected, **EXACT)


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("out of luck")


@pytest.fixture
def poisoned(member: LocalMember) -> Iterator[int]:
    """A token whose embedding is not a number."""
    weight, token = member._body.embedding.weight.data, 7
    saved = weight[token].clone()
    weight[token] = torch.nan
    yield token
    weight[token] = saved


@pytest.mark.parametrize("kind", ["llama", "gemma3"])  # the others' tied heads would make every answer NaN
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_sequence_that_is_not_finite_harms_no_other(
    member: LocalMember, original: Any, poisoned: int, kind: Kind, wanted: int
) -> None:
    """Not beside it in one group, and not after it in its row, even if it left in the middle of its prefill."""
    ids = [i if i != poisoned else 8 for i in random_ids(member, 40, seed=7)]
    sick = [*ids[:10], poisoned, *ids[10:30]]
    answer = whole(member, [Feed(1, sick, wanted), Feed(2, ids[:31], 31)])
    torch.testing.assert_close(answer[wanted:], own_logprobs(original, ids[:31]), **EXACT)
    assert not answer[:wanted].isfinite().any()
    decoded = whole(member, [Feed(1, [9]), Feed(2, ids[31:32])])
    torch.testing.assert_close(decoded[1], own_logprobs(original, ids[:32])[31], **EXACT)
    member.release(1)
    if isinstance(member._cache, KVCache):
        assert member._cache.row(3).index == 0
    ask(member, [Feed(3, ids[:2], 0)], 1)  # short, in the sick one's row, grouped with a long one
    after = whole(member, [Feed(3, ids[2:3]), Feed(2, ids[32:33])])
    expected = torch.stack([own_logprobs(original, ids[:3])[2], own_logprobs(original, ids[:33])[32]])
    torch.testing.assert_close(after, expected, **EXACT)


@pytest.mark.parametrize("misuse", ["too long", "no row", "twice"])
@pytest.mark.parametrize("kind", ["llama"])
def test_misuse_is_an_error_that_advances_nothing(member: LocalMember, misuse: str) -> None:
    ask(member, [Feed(0, [5] * 150, 0)], 1)
    feeds = {
        "too long": [Feed(0, [5] * 11)],
        "no row": [Feed(seq, [5]) for seq in range(member.num_pages + 1)],
        "twice": [Feed(0, [5]), Feed(0, [6])],
    }[misuse]
    with pytest.raises(MemberError, match="AssertionError"):
        ask(member, feeds, 1)
    assert member._cache.length(0) == 150
    member.check_cache()


@each_kind
def test_bfloat16_differs_by_rounding_alone(tiny_checkpoints: dict[Kind, Path], kind: Kind) -> None:
    """Batched, single and the model's own forward are equally far from the float32 numbers."""
    member = load(tiny_checkpoints[kind], dtype="bfloat16")
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoints[kind], dtype=torch.bfloat16).eval()
    texts = {seq: random_ids(member, 30 + seq, seed=seq) for seq in range(5)}
    feeds = [Feed(seq, ids, len(ids)) for seq, ids in texts.items()]
    together = whole(member, feeds).exp()
    for seq in texts:
        member.release(seq)
    apart = torch.cat([whole(member, [feed]) for feed in feeds]).exp()
    own = torch.cat([own_logprobs(original, ids) for ids in texts.values()]).exp()
    original.float()
    exact = torch.cat([own_logprobs(original, ids) for ids in texts.values()]).exp()
    noise = variation(own, exact)
    assert variation(together, apart) <= 2 * noise
    assert variation(together, own) <= 2 * noise
    assert variation(together, exact) <= 2 * noise


def variation(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().sum(dim=1).mean() / 2)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(("held", "shared"), [(60, 60), (60, 40), (33, 20)])
def test_reuse_is_a_fresh_prefill(
    member: LocalMember, original: Any, kind: Kind, running: bool, held: int, shared: int
) -> None:
    """From a running sequence and from one that is gone, to its end or before it, past Gemma 3's window of 8."""
    ids, other = random_ids(member, 60, seed=11), random_ids(member, 20, seed=12)
    ask(member, [Feed(1, ids, 0), Feed(2, other, 0)], 1)
    member._cache.rollback(1, held)
    if not running:
        member.release(1, keep=True)
    prompt = ids[:shared] + other
    found = member.reuse(3, prompt[:-1])
    assert found == shared
    answer = whole(member, [Feed(2, other[:1]), Feed(3, prompt[found:], len(prompt) - found)])[1:]
    torch.testing.assert_close(answer, own_logprobs(original, prompt)[found:], **EXACT)
    member.check_cache()
    if running:
        again = whole(member, [Feed(1, other[:3], 3)])
        torch.testing.assert_close(again, own_logprobs(original, ids[:held] + other[:3])[held:], **EXACT)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_prefixes_that_make_way_for_each_other_stay_exact(member: LocalMember, original: Any, kind: Kind) -> None:
    """More prompts than rows, with shared heads, greedy: the texts are those of the model's own `generate`."""
    heads = [random_ids(member, 30, seed=20 + i) for i in range(3)]
    rng, reused = random.Random(0), 0
    turns = 3 * member.num_pages if isinstance(member._cache, KVCache) else 60
    for turn in range(turns):
        prompt = heads[turn % 3] + random_ids(member, rng.randint(1, 9), seed=turn)
        found = member.reuse(turn % 5, prompt[:-1])
        reused += found >= 30
        feed, text = prompt[found:], []
        for _ in range(3):
            feed = [int(ask(member, [Feed(turn % 5, feed)], 4).token_ids[0, 0])]
            text += feed
        member.check_cache()
        member.release(turn % 5, keep=True)
        if turn % 7 == 0:
            assert text == greedy(original, prompt, 3)
    assert reused == turns - 3


@pytest.mark.parametrize("kind", ["llama"])
def test_a_poisoned_prompt_is_never_reused(member: LocalMember, original: Any, poisoned: int, kind: Kind) -> None:
    """It is prefilled without an answer, so nobody has seen that it is not finite."""
    ids = [i if i != poisoned else 8 for i in random_ids(member, 40, seed=7)]
    sick = [*ids[:20], poisoned, *ids[20:]]
    ask(member, [Feed(1, sick, 0)], 1)
    assert member.reuse(2, sick) == 0
    member.release(1, keep=True)
    assert member.reuse(3, sick) == 0
    assert member.reuse(4, ids) == 0
    torch.testing.assert_close(whole(member, [Feed(4, ids, 40)]), own_logprobs(original, ids), **EXACT)


@pytest.mark.parametrize("kind", ["llama"])
def test_a_salt_is_a_cache_of_its_own(member: LocalMember, original: Any, kind: Kind) -> None:
    """Running or gone, only the same salt is taken over; the numbers are the model's own either way."""
    ids = random_ids(member, 40, seed=31)
    ask(member, [Feed(1, ids[:30], 0, salt="a"), Feed(2, ids[:20], 0)], 1)
    member.release(1, keep=True)
    found = {}
    for seq_id, salt in ((3, "a"), (4, ""), (5, "b")):
        found[salt] = member.reuse(seq_id, ids[:39], salt)
        rest = ids[found[salt] :]
        answer = whole(member, [Feed(seq_id, rest, len(rest), salt=salt)])
        torch.testing.assert_close(answer, own_logprobs(original, ids)[found[salt] :], **EXACT)
        member.check_cache()
    assert found == {"a": 30, "": 20, "b": 0}

"""A salt keeps cached prefixes apart: in rows, in pages, and through the engine to every kind of member."""

from __future__ import annotations

import random
from collections import abc
from typing import Any

import pytest
import torch
from fakes import Bench, FakeMember, Records, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary, run
from stand_ins import StandIn, standing_in

from ensemble_core.decoding.requests import GenerationRequest, salted
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError, WireError
from ensemble_core.hosts import ServerHost
from ensemble_core.members.base import Abilities, Feed
from ensemble_core.members.cache.base import MIN_PREFIX, LayerShape
from ensemble_core.members.cache.pages import PagedCache
from ensemble_core.members.cache.rows import KVCache
from ensemble_core.members.remote.codec import decode_feeds, encode_feeds
from ensemble_core.members.remote.servers.member import ServerMember
from ensemble_core.stats import PrefixStats

LAYERS = [LayerShape(1, 2, torch.device("cpu"))]
IDS = [1 + i % 7 for i in range(30)]
SALTS = ("", "a", "b")
HEAD = "deed bad cab de " * 4
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)

Pool = KVCache | PagedCache


def rows() -> Pool:
    return KVCache(LAYERS, 4, 40, torch.float32)


def pages() -> Pool:
    return PagedCache(LAYERS, 30, 4, 40, torch.float32)


def write(pool: Pool, seq_id: int, ids: list[int], salt: str) -> None:
    """A forward; what it writes is zero and finite."""
    pool.reserve(seq_id, len(ids), salt)
    pool.advance(seq_id, ids)


@pytest.mark.parametrize("make", [rows, pages])
@pytest.mark.parametrize("kept", [False, True], ids=["running", "kept"])
@pytest.mark.parametrize("mine", SALTS)
@pytest.mark.parametrize("theirs", SALTS)
def test_only_the_same_salt_is_a_hit(make: abc.Callable[[], Pool], kept: bool, mine: str, theirs: str) -> None:
    pool = make()
    write(pool, 1, IDS, theirs)
    if kept:
        pool.release(1, keep=True)
    assert pool.reuse(2, IDS[:29], mine) == (29 if mine == theirs else 0)
    pool.check()
    write(pool, 2, IDS[pool.length(2) :], mine)
    pool.release(2, keep=True)
    pool.release(1, keep=True)
    assert pool.prefixes == ([IDS] if mine == theirs else pool.prefixes)
    assert len(pool.prefixes) == len({mine, theirs}), "a prefix of another salt is not replaced"
    assert pool.num_free == pool.num_pages
    pool.check()


@pytest.mark.parametrize("make", [rows, pages])
def test_what_began_with_a_prefix_leaves_one_of_its_own_salt(make: abc.Callable[[], Pool]) -> None:
    pool = make()
    write(pool, 1, IDS[:20], "a")
    assert pool.reuse(2, IDS[:25], "a") == 20
    write(pool, 2, IDS[20:], "a")
    pool.release(1, keep=True)
    pool.release(2, keep=True)
    assert [pool.reuse(9, IDS, salt) for salt in ("", "b")] == [0, 0]
    assert pool.reuse(9, IDS, "a") == 30
    pool.check()


@pytest.mark.parametrize("make", [rows, pages])
@pytest.mark.parametrize("seed", range(20))
def test_a_walk_with_salts(make: abc.Callable[[], Pool], seed: int) -> None:
    """Against a plain account: a hit is as long as the best of the same salt, and never of another."""
    rng, pool, running = random.Random(seed), make(), dict[int, tuple[str, list[int]]]()
    kept: list[tuple[str, list[int]]] = []  # all that may still be cached
    for seq_id in range(120):
        if running and (rng.random() < 0.5 or len(running) == 4):
            gone = rng.choice(list(running))
            pool.release(gone, keep=True)
            kept.append(running.pop(gone))
        else:
            salt, length = rng.choice(SALTS), rng.randint(1, 36)
            ids = [rng.choice((1, 1, 1, 2)) if i > 20 else 1 for i in range(length)]
            known = [each for of, each in (*running.values(), *kept) if of == salt]
            most = max((common(ids[:-1], each) for each in known), default=0)
            least = max((common(ids[:-1], each) for of, each in running.values() if of == salt), default=0)
            found = pool.reuse(seq_id, ids[:-1], salt)
            assert (least if least >= MIN_PREFIX else 0) <= found <= most
            write(pool, seq_id, ids[found:], salt)
            running[seq_id] = salt, ids
        pool.check()
    for seq_id in running:
        pool.release(seq_id)
    assert pool.num_free == pool.num_pages


def common(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


class Salted(Bench):
    """An ensemble of fake members whose requests may have a salt."""

    def __init__(self, **members: Any) -> None:
        self.records = Records()
        made = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1, **members),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2, **members),
        }
        super().__init__(fake_loaded(fake_config(), made, self.records.append), made)

    def ask(self, salt: str, prompt: str = HEAD, **params: Any) -> tuple[str, int]:
        """The text, and how many tokens of the prompt main had cached."""
        own = SamplingParams(**{"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | params)
        made = self.loaded.admission.admit(GenerationRequest("r", "duo", prompt, own, salt=salt))
        self.engine.add([made])
        self.run()
        return made.shown.text, made.num_reused


def test_through_the_engine() -> None:
    bench = Salted()
    plain, _ = Salted().ask("")
    order = ["", "a", "a", "", "b", "a", "b", ""]
    seen: set[str] = set()
    for salt in order:
        text, reused = bench.ask(salt)
        assert text == plain, "a salt changes no answer"
        assert (reused > 0) == (salt in seen)
        seen.add(salt)
    hits = {stats.member for stats in bench.records.of(PrefixStats)}
    assert hits == {"alpha", "beta"}


def test_a_prompt_that_is_not_looked_up_still_leaves_its_salt() -> None:
    """Too short for a look-up; scored; cut by a preemption: what stays behind is the salt's."""
    for prompt, params in (("ab", {"max_tokens": 60}), (HEAD, {"echo": True, "logprobs": 1})):
        bench = Salted(min_prefix=16)
        text, _ = bench.ask("a", prompt, **params)
        longer = prompt + text
        assert bench.ask("", longer)[1] == 0
        assert bench.ask("b", longer)[1] == 0
        assert bench.ask("a", longer)[1] > 0


def test_choices_of_one_request_share_its_prefill() -> None:
    bench = Salted()
    requests = [
        GenerationRequest(f"r{i}", "duo", HEAD, SamplingParams(max_tokens=4, seed=i), group="g", salt="a")
        for i in range(4)
    ]
    made = bench.loaded.admission.admit_all(requests)
    bench.engine.add(made)
    bench.run()
    assert [each.num_reused > 0 for each in made] == [False, True, True, True]
    assert bench.ask("")[1] == 0


def test_it_is_refused_where_a_member_cannot() -> None:
    bench = Salted(abilities=Abilities(salts=False))
    assert bench.ask("")
    with pytest.raises(InvalidRequestError, match="member 'alpha' cannot keep what it has cached apart") as caught:
        bench.ask("a")
    assert caught.value.param == "cache_salt"


def test_a_salt_is_no_secret_on_its_way() -> None:
    assert len(salted("x" * 1024)) == len(salted("é")) == 64
    assert salted("secret") != salted("secret ")
    assert "secret" not in salted("secret")


def test_a_salt_that_is_no_text_is_no_message() -> None:
    sent = encode_feeds([Feed(1, [2], salt="ab"), Feed(2, [3])])
    assert [feed.salt for feed in decode_feeds(sent)] == ["ab", ""]
    with pytest.raises(WireError, match="salt is no UTF-8"):
        decode_feeds(sent.replace(b"a\0\0\0\0\0\0\0b", b"\xff\0\0\0\0\0\0\0b"))


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_servers_are_told_or_cannot(kind: str) -> None:
    state = StandIn(FakeMember("far", pair_vocabulary(), seed=7))
    with standing_in(kind, state) as server:
        host = ServerHost(kind=kind, url=server.url, timeout=2.0)  # type: ignore[arg-type]
        member = ServerMember("far", pair_vocabulary(), host, max_len=256, max_running=4, num_candidates=24)
        member.wait_ready()
        assert member.abilities.salts == (kind != "llamacpp")
        local = FakeMember("far", pair_vocabulary(), seed=7)
        feeds = [
            Feed(i, [97 + i], also=((3, 250),), top_k=24, salt=salt) for i, salt in enumerate(("", "a", "b", "a"))
        ]
        state.requests.clear()
        found = member.forward(feeds)
        assert torch.equal(found.joined().token_ids, local.forward(feeds).joined().token_ids)
        if kind == "vllm":
            told = [(body.get("cache_salt"), len(body["prompt"])) for body in state.requests]
            assert told == [(None, 1), ("a", 2), ("b", 1)] * 2, "and once more for what must be there"
        elif kind == "sglang":
            assert [body["extra_key"] for body in state.requests] == [["", "a", "b", "a"]]
        state.requests.clear()
        member.forward([Feed(7, [99], top_k=24)])
        assert not any(body.keys() & {"cache_salt", "extra_key"} for body in state.requests)
        member.close()


def test_pages_come_back_where_salted_requests_are_cut_short() -> None:
    bench = Salted()
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    made = [bench.loaded.admission.admit(GenerationRequest("r", "duo", HEAD, params, salt=s)) for s in "abc"]
    bench.engine.add(made)
    for _ in range(3):
        bench.step()
    bench.engine.abort([each.seq_id for each in made])
    assert run(bench.engine) == {}
    assert all(member.is_empty for member in bench.members.values())

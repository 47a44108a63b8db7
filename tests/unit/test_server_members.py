"""Members behind inference servers: the same numbers as in this process, and an error that says what is wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeMember, pair_vocabulary
from stand_ins import Running, StandIn, standing_in

from ensemble_core.errors import HostError, MemberError, MemberLostError, MemberTimeoutError
from ensemble_core.hosts import ServerHost
from ensemble_core.members.base import Answers, Feed
from ensemble_core.members.remote.servers import member as members
from ensemble_core.members.remote.servers.member import ServerMember

KINDS = ["vllm", "llamacpp", "sglang"]
KEY = "a-secret-key"
K = 24


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def state() -> StandIn:
    return StandIn(FakeMember("far", pair_vocabulary(), seed=7))


@pytest.fixture
def running(kind: str, state: StandIn) -> Iterator[Running]:
    with standing_in(kind, state) as server:
        yield server


def member_of(kind: str, url: str, **changes: Any) -> ServerMember:
    host = ServerHost(kind=kind, url=url, **{"timeout": 2.0, **changes})  # type: ignore[arg-type]
    return ServerMember("far", pair_vocabulary(), host, max_len=256, max_running=4, num_candidates=K)


@pytest.fixture
def member(kind: str, running: Running) -> Iterator[ServerMember]:
    made = member_of(kind, running.url)
    made.wait_ready()
    yield made
    made.close()


def assert_same(found: Answers, expected: Answers) -> None:
    assert found.spans == expected.spans
    for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert torch.equal(mine.token_ids, theirs.token_ids)
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.tail, theirs.tail, atol=1e-4, rtol=0)


def test_it_answers_as_the_member_itself(member: ServerMember, state: StandIn) -> None:
    """Chunks, rollbacks, several positions, widths and sequences."""
    local = FakeMember("far", pair_vocabulary(), seed=7)
    steps = [
        [Feed(1, [97, 98, 99], wanted=0, top_k=K), Feed(2, [100], top_k=K)],
        [Feed(1, [100, 101], keep=3, top_k=K), Feed(2, [97, 98], wanted=2, keep=1, top_k=K)],
        [Feed(1, [97], keep=2, top_k=K), Feed(2, [99, 100, 101], wanted=3, keep=2, top_k=5)],
    ]
    for feeds in steps:
        assert_same(member.forward(feeds), local.forward(feeds))
    member.release(1)
    assert member.free_pages == 3


def test_ids_that_must_be_there_are_there(member: ServerMember) -> None:
    local = FakeMember("far", pair_vocabulary(), seed=7)
    feeds = [
        Feed(1, [97, 98], also=((3, 200, 255),), top_k=K),
        Feed(2, [99, 100, 101], wanted=2, also=((7,), (250, 251)), top_k=K),
        Feed(3, [99], top_k=K),
    ]
    assert_same(member.forward(feeds), local.forward(feeds))


def test_one_request_a_step(member: ServerMember, state: StandIn) -> None:
    state.requests.clear()
    member.forward([Feed(i, [97 + i], top_k=K) for i in range(4)])
    assert len(state.requests) == 1
    member.forward([Feed(9, [97, 98], wanted=0, top_k=K)])
    assert len(state.requests) == 1, "a chunk of a prompt asks nothing"


def test_a_whole_vocabulary_where_it_can_be_had(kind: str, member: ServerMember) -> None:
    if member.abilities.max_k is not None:
        assert (kind in ("vllm", "sglang"), member.abilities.max_k) == (True, K)
        return
    size = len(pair_vocabulary())
    local = FakeMember("far", pair_vocabulary(), seed=7)
    feeds = [Feed(1, [97, 98], top_k=size)]
    assert_same(member.forward(feeds), local.forward(feeds))


def refused(made: ServerMember) -> str:
    try:
        with pytest.raises(HostError) as caught:
            made.wait_ready()
        return str(caught.value)
    finally:
        made.close()


def test_a_wrong_tokenizer_is_refused(kind: str, running: Running, state: StandIn) -> None:
    state.other_tokens = True
    said = refused(member_of(kind, running.url))
    assert "has another tokenizer" in said
    assert "`model` must be the one that it serves" in said


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"], indirect=True)
def test_processed_numbers_are_refused(kind: str, running: Running, state: StandIn) -> None:
    """SGLang is asked at temperature 0 alone, where its numbers are plain."""
    state.processed = True
    assert "tells other numbers at temperature 2" in refused(member_of(kind, running.url))


def test_a_small_limit_of_log_probabilities_is_named(state: StandIn) -> None:
    state.max_logprobs = 20
    with standing_in("vllm", state) as server:
        said = refused(member_of("vllm", server.url))
    assert f"does not tell {K} candidates, which is scheduler.num_candidates" in said
    assert f"--max-logprobs {K} or more" in said


def test_a_wrong_key_is_named_and_never_told(
    kind: str, running: Running, state: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.key = KEY
    assert "name the variable that holds its key" in refused(member_of(kind, running.url))
    monkeypatch.setenv("FAR_KEY", "another-secret")
    said = refused(member_of(kind, running.url, api_key_env="FAR_KEY"))
    assert "correct the key in FAR_KEY" in said
    assert "another-secret" not in said
    monkeypatch.setenv("FAR_KEY", KEY)
    right = member_of(kind, running.url, api_key_env="FAR_KEY")
    right.wait_ready()
    right.close()
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(HostError, match="FAR_KEY is not set"):
        member_of(kind, running.url, api_key_env="FAR_KEY")


def test_a_server_that_is_not_there(kind: str) -> None:
    said = refused(member_of(kind, "http://127.0.0.1:9"))
    assert "cannot be reached" in said
    assert "is members.far.host.server right" in said


def test_another_kind_of_server(running: Running, kind: str) -> None:
    other = KINDS[(KINDS.index(kind) + 1) % len(KINDS)]
    assert "host.server" in refused(member_of(other, running.url))


def test_there_is_room_for_the_answer(member: ServerMember, state: StandIn) -> None:
    assert (state.max_len, member.max_len) == (256, 255)


def test_a_shorter_context_is_refused(kind: str, running: Running, state: StandIn) -> None:
    state.max_len = 128
    assert "lower it, or raise its limit" in refused(member_of(kind, running.url))


def test_another_name_is_refused(running: Running, kind: str) -> None:
    if kind == "llamacpp":
        return  # it serves one model, whatever the name
    assert "is not served by" in refused(member_of(kind, running.url, served="large"))


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        ({"broken": 500}, MemberError, "answered 500: told to fail"),
        ({"broken": 503}, MemberLostError, "answered 503"),
        ({"hangs": 0.6}, MemberTimeoutError, "host.server.timeout, 0.3 s"),
        ({"garbled": True}, MemberError, "cannot be read"),
    ],
)
def test_a_failure_is_an_error_of_that_call(
    kind: str, running: Running, state: StandIn, trouble: dict[str, Any], error: type[MemberError], says: str
) -> None:
    made = member_of(kind, running.url, timeout=0.3)
    made.wait_ready()
    made.forward([Feed(1, [97, 98], top_k=K)])
    for name, value in trouble.items():
        setattr(state, name, value)
    with pytest.raises(error, match=says):
        made.forward([Feed(1, [99], keep=2, top_k=K)])
    for name, value in {"broken": 0, "hangs": 0.0, "garbled": False}.items():
        setattr(state, name, value)
    deadline = time.monotonic() + 10.0
    while made.lost is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    local = FakeMember("far", pair_vocabulary(), seed=7)
    local.forward([Feed(1, [97, 98], top_k=K)])
    assert_same(made.forward([Feed(1, [99], keep=2, top_k=K)]), local.forward([Feed(1, [99], keep=2, top_k=K)]))
    made.close()


def lost(member: ServerMember, until: bool) -> None:
    deadline = time.monotonic() + 10.0
    while (member.lost is not None) is not until:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_dies_is_lost_until_it_is_back(
    kind: str, running: Running, member: ServerMember, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = [Feed(1, [97, 98], top_k=K)]
    member.forward(feeds)
    running.stop()
    started = time.monotonic()
    with pytest.raises(MemberLostError, match="cannot be reached"):
        member.forward([replace(feeds[0], keep=2)])
    assert time.monotonic() - started < 1.0
    lost(member, True)
    running.start()
    lost(member, False)
    local = FakeMember("far", pair_vocabulary(), seed=7)
    local.forward(feeds)
    assert_same(member.forward([replace(feeds[0], keep=2)]), local.forward([replace(feeds[0], keep=2)]))


def test_another_model_at_its_place_is_not_taken_back(
    kind: str, running: Running, state: StandIn, member: ServerMember
) -> None:
    running.stop()
    with pytest.raises(MemberLostError):
        member.forward([Feed(1, [97], top_k=K)])
    state.member = FakeMember("far", pair_vocabulary(), seed=8)
    running.start()
    deadline = time.monotonic() + 10.0
    while "another model answers" not in (member.lost or ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_kinds_are_known() -> None:
    assert list(members.DIALECTS) == ["vllm", "llamacpp", "sglang"]

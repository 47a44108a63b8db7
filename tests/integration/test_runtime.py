"""The engine's thread over fake members: every submitted request ends exactly once, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Output, Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.engine import News
from ensemble_core.errors import (
    CheckpointError,
    InvalidRequestError,
    ModelNotFoundError,
    NotReadyError,
    QueueFullError,
)
from ensemble_core.factory import Loaded
from ensemble_core.runtime import Runtime
from ensemble_core.stats import Record

Members = dict[str, FakeMember]


@pytest.fixture
def members() -> Members:
    return {
        "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
        "beta": FakeMember("beta", pair_vocabulary(), seed=2),
    }


@pytest.fixture
def runtime(members: Members, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    with started(members, monkeypatch) as made:
        made.wait_ready()
        yield made


@contextmanager
def started(members: Members, monkeypatch: pytest.MonkeyPatch, **sections: object) -> Iterator[Runtime]:
    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    monkeypatch.setattr(factory, "load", load)
    made = Runtime(fake_config(**sections))  # type: ignore[arg-type]
    made.start()
    try:
        yield made
    finally:
        for member in members.values():
            member.gate.set()
        made.stop()


def request(max_tokens: int = 12, prompt: str = "abc", model: str = "duo") -> GenerationRequest:
    return GenerationRequest("r", model, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def read(runtime: Runtime, *requests: GenerationRequest) -> dict[int, list[Output]]:
    outputs: dict[int, list[Output]] = {index: [] for index in range(len(requests))}
    async for index, output in await runtime.submit(requests):
        outputs[index].append(output)
    return outputs


def reasons(outputs: dict[int, list[Output]]) -> list[str | None]:
    """Each request's end; exactly its last output has one."""
    assert all(output.finish_reason is None for each in outputs.values() for output in each[:-1])
    return [each[-1].finish_reason for each in outputs.values()]


def wait_empty(members: Members) -> None:
    wait(lambda: all(member.is_empty for member in members.values()))


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


def test_a_batch_streams_to_its_ends(runtime: Runtime, members: Members) -> None:
    outputs = asyncio.run(read(runtime, request(5), request(9, "de"), request(3, model="beta")))
    assert reasons(outputs) == ["length"] * 3
    assert [outputs[i][-1].num_completion_tokens for i in range(3)] == [5, 9, 3]
    wait_empty(members)
    assert [model.name for model in runtime.models()] == ["duo", "alpha", "beta"]
    assert runtime.models()[0].max_model_len == 256


def test_many_clients_get_what_one_gets(runtime: Runtime) -> None:
    async def together() -> list[dict[int, list[Output]]]:
        return await asyncio.gather(*(read(runtime, request(4 + i)) for i in range(12)))

    for i, outputs in enumerate(asyncio.run(together())):
        text = "".join(output.text for output in asyncio.run(read(runtime, request(4 + i)))[0])
        assert "".join(output.text for output in outputs[0]) == text


@pytest.mark.parametrize("num_read", [0, 3])
def test_a_closed_stream_is_aborted(runtime: Runtime, members: Members, num_read: int) -> None:
    async def leave() -> None:
        stream = await runtime.submit([request(200), request(200)])
        for _ in range(num_read):
            await anext(stream)
        await stream.aclose()

    started_at = len(members["alpha"].calls)
    asyncio.run(leave())
    wait_empty(members)
    assert len(members["alpha"].calls) - started_at < 190


@pytest.mark.parametrize(
    ("wrong", "error"),
    [(request(model="nobody"), ModelNotFoundError), (request(prompt=""), InvalidRequestError)],
)
def test_refusals_come_before_the_stream(
    runtime: Runtime, wrong: GenerationRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        asyncio.run(read(runtime, request(), wrong))
    assert reasons(asyncio.run(read(runtime, request()))) == ["length"]


async def refused_while_one_waits(runtime: Runtime) -> None:
    """One more than fits the queue is refused, all of it."""
    first = await runtime.submit([request(max_tokens=200), request(max_tokens=200)])
    with pytest.raises(QueueFullError):
        await runtime.submit([request(), request()])
    await first.aclose()


def test_a_full_queue_refuses_all_of_a_batch(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(members, monkeypatch, scheduler={"max_waiting": 2, "max_running": 1}) as runtime:
        runtime.wait_ready()
        with pytest.raises(InvalidRequestError, match="at most 2"):  # it could never succeed
            asyncio.run(read(runtime, request(), request(), request()))
        asyncio.run(refused_while_one_waits(runtime))
        assert reasons(asyncio.run(read(runtime, request(), request()))) == ["length"] * 2
        wait_empty(members)


def test_nothing_is_taken_while_loading(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(fake_config())
    assert runtime.status().state == "loading"
    assert [model.name for model in runtime.models()] == ["duo", "alpha", "beta"]
    with pytest.raises(NotReadyError, match="loading"):
        asyncio.run(read(runtime, request()))
    runtime.stop()


def test_a_failure_to_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: Config, record: Record) -> Loaded:
        raise CheckpointError("no weights here")

    monkeypatch.setattr(factory, "load", load)
    runtime = Runtime(fake_config())
    runtime.start()
    with pytest.raises(CheckpointError, match="no weights here"):
        runtime.wait_ready()
    assert runtime.status().state == "dead"
    assert "no weights here" in runtime.status().reason
    with pytest.raises(NotReadyError, match="no weights here"):
        asyncio.run(read(runtime, request()))
    runtime.stop()


def test_a_member_that_fails_ends_its_requests_alone(runtime: Runtime, members: Members) -> None:
    members["beta"].fails_on = {0}
    outputs = asyncio.run(read(runtime, request(), request(model="alpha")))
    assert reasons(outputs) == ["error", "length"]
    assert runtime.status().state == "ready"
    wait_empty(members)


def test_an_engine_that_breaks_ends_every_stream(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[News]:
        raise ZeroDivisionError("a bug")

    async def both() -> dict[int, list[Output]]:
        first = await runtime.submit([request(240), request(240)])
        second = await runtime.submit([request(240)])
        assert runtime._loaded is not None
        monkeypatch.setattr(runtime._loaded.engine, "step", broken)
        outputs: dict[int, list[Output]] = {0: [], 1: []}
        async for index, output in first:
            outputs[index].append(output)
        return outputs | {2: [output async for _, output in second]}

    outputs = asyncio.run(asyncio.wait_for(both(), 10.0))
    assert reasons(outputs) == ["error"] * 3
    assert all("a bug" in (each[-1].error or "") for each in outputs.values())
    assert runtime.status().state == "dead"
    assert "a bug" in runtime.status().reason
    with pytest.raises(NotReadyError, match="a bug"):
        asyncio.run(read(runtime, request()))


def test_draining_lets_the_running_end(runtime: Runtime, members: Members) -> None:
    async def drain() -> dict[int, list[Output]]:
        stream = await runtime.submit([request(40)])
        draining = asyncio.create_task(runtime.drain(10.0))
        await asyncio.sleep(0)
        assert runtime.status().state == "draining"
        with pytest.raises(NotReadyError, match="draining"):
            await runtime.submit([request()])
        outputs = {0: [output async for _, output in stream]}
        await draining
        return outputs

    assert reasons(asyncio.run(drain())) == ["length"]
    wait_empty(members)


@pytest.mark.parametrize("how", ["drain", "stop"])
def test_what_runs_too_long_is_aborted(runtime: Runtime, members: Members, how: str) -> None:
    async def cut() -> dict[int, list[Output]]:
        members["alpha"].gate.clear()
        stream = await runtime.submit([request(250 - 3)])
        members["alpha"].entered.wait(5.0)
        if how == "drain":
            await runtime.drain(0.0)
            members["alpha"].gate.set()
        else:
            asyncio.get_running_loop().call_later(0.05, members["alpha"].gate.set)
            await asyncio.to_thread(runtime.stop)
        return {0: [output async for _, output in stream]}

    outputs = asyncio.run(cut())
    assert reasons(outputs) == ["abort"]
    wait_empty(members)


def test_a_cancelled_submit_leaks_nothing(runtime: Runtime, members: Members) -> None:
    async def cancel() -> None:
        members["alpha"].gate.clear()
        first = await runtime.submit([request(3)])
        await asyncio.to_thread(members["alpha"].entered.wait, 5.0)
        late = asyncio.create_task(runtime.submit([request(200)]))
        await asyncio.sleep(0.05)  # the engine is busy: the command waits
        late.cancel()
        members["alpha"].gate.set()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert [output.finish_reason async for _, output in first][-1] == "length"

    asyncio.run(cancel())
    wait_empty(members)
    wait(lambda: not runtime._listeners)


def test_stop_is_final(runtime: Runtime) -> None:
    runtime.stop()
    runtime.stop()
    assert runtime.status().state == "dead"
    with pytest.raises(NotReadyError, match="stopped"):
        asyncio.run(read(runtime, request()))


def test_tokens_of_a_prompt_and_back(runtime: Runtime) -> None:
    text = "abc é"
    for model, vocabulary in (("duo", byte_vocabulary()), ("beta", pair_vocabulary())):
        made = asyncio.run(runtime.tokenize(model, text))
        assert list(made.token_ids) == vocabulary.encode(text)
        assert made.tokens == tuple(vocabulary.name_of(i) for i in made.token_ids)
        assert made.max_model_len == 256
        assert asyncio.run(runtime.detokenize(model, made.token_ids)) == text
    assert asyncio.run(runtime.detokenize("duo", [97, 256])) == "a<eos>"
    chat = asyncio.run(runtime.tokenize("duo", Conversation(({"role": "user", "content": "a"},))))
    assert bytes(chat.token_ids) == b"user: a\nassistant:"


def test_no_text_and_no_tokens_are_each_others_form(runtime: Runtime) -> None:
    assert asyncio.run(runtime.tokenize("duo", "")).token_ids == ()
    assert asyncio.run(runtime.detokenize("duo", [])) == ""


def test_a_tokenizer_is_described(runtime: Runtime) -> None:
    info = runtime.tokenizer_info("duo")
    assert (info["member"], info["vocab_size"], info["stop_token_ids"]) == ("alpha", 257, [256])
    assert (info["eos_token"], info["eos_token_id"], info["bos_token"]) == ("<eos>", 256, None)
    assert info["fingerprint"] == byte_vocabulary().fingerprint
    assert info["tokenizer_class"] == "FakeTokenizer"
    assert runtime.tokenizer_info("beta")["vocab_size"] == len(pair_vocabulary())


def test_wrong_questions_about_tokens_are_refused(runtime: Runtime) -> None:
    for wrong in ([257], [-1]):
        with pytest.raises(InvalidRequestError, match="vocabulary"):
            asyncio.run(runtime.detokenize("duo", wrong))
    with pytest.raises(InvalidRequestError, match=r"^tokens: "):
        asyncio.run(runtime.detokenize("duo", [300]))
    with pytest.raises(ModelNotFoundError):
        asyncio.run(runtime.tokenize("nobody", "a"))
    with pytest.raises(ModelNotFoundError):
        asyncio.run(runtime.detokenize("nobody", [97]))
    with pytest.raises(ModelNotFoundError):
        runtime.tokenizer_info("nobody")


def test_tokens_wait_for_the_vocabulary() -> None:
    runtime = Runtime(fake_config())
    with pytest.raises(NotReadyError, match="loading"):
        asyncio.run(runtime.tokenize("duo", "a"))
    with pytest.raises(NotReadyError, match="loading"):
        runtime.tokenizer_info("duo")
    runtime.stop()


def test_an_engine_that_stands_still_is_dead_and_nobody_waits(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(members, monkeypatch, scheduler={"stall_seconds": 0.4}) as runtime:
        runtime.wait_ready()
        assert reasons(asyncio.run(read(runtime, request()))) == ["length"]
        time.sleep(1.0)
        assert runtime.status().state == "ready", "an idle engine does not stand still"
        members["alpha"].gate.clear()
        begun = time.monotonic()
        outputs = asyncio.run(read(runtime, request(), request()))
        assert time.monotonic() - begun < 5
        assert reasons(outputs) == ["error"] * 2
        assert runtime.status().state == "dead"
        assert "no step" in runtime.status().reason
        with pytest.raises(NotReadyError, match="no step"):
            asyncio.run(read(runtime, request()))
        assert not runtime.stop(0.1), "a step that hangs does not hold up the end"
        members["alpha"].gate.set()
        assert runtime.stop(5.0)


def test_aborting_all_ends_every_stream(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(members, monkeypatch) as runtime:
        runtime.wait_ready()

        async def ended() -> dict[int, list[Output]]:
            reading = asyncio.create_task(read(runtime, request(200), request(200)))
            await asyncio.sleep(0.05)
            runtime.abort_all()
            return await reading

        assert set(reasons(asyncio.run(ended()))) <= {"abort", "length"}
        assert runtime.status().state == "draining"
        wait_empty(members)


def test_a_request_may_not_choose_what_makes_others_wait(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(members, monkeypatch) as runtime:
        runtime.wait_ready()
        costly = replace(request(), overrides=Overrides(fusion="relative", fusion_options={"steps": 100}))
        with pytest.raises(InvalidRequestError, match="allow_overrides"):
            asyncio.run(read(runtime, costly))


DUO = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha"}
POLL = {"kind": "vote", "models": {"duo": 2, "beta": 1}, "answer": "exact"}
MOA = {"kind": "graph", "nodes": {"a": "alpha", "end": "duo"}, "edges": [["a", "end"]]}


@contextmanager
def councils(members: Members, monkeypatch: pytest.MonkeyPatch, **scheduler: int) -> Iterator[Runtime]:
    recipes = {"duo": DUO, "poll": POLL, "moa": MOA}
    with started(members, monkeypatch, ensembles=recipes, scheduler=scheduler) as runtime:
        runtime.wait_ready()
        yield runtime


def test_a_council_answers_over_the_engine(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    with councils(members, monkeypatch) as runtime:
        (outputs,) = asyncio.run(read(runtime, request(6, model="poll"))).values()
        own = asyncio.run(read(runtime, request(6, model="duo")))[0]
        assert outputs[-1].served_by == "duo"
        assert outputs[-1].report is not None
        assert [call.model for call in outputs[-1].report.calls] == ["beta", "duo", "duo"]
        assert "".join(each.text for each in outputs) == "".join(each.text for each in own)
        wait_empty(members)
        assert runtime._num_reserved == 0


def test_a_council_goes_on_while_the_server_drains(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drained(runtime: Runtime) -> list[str | None]:
        stream = await runtime.submit([request(4, model="moa")])
        draining = asyncio.create_task(runtime.drain(5.0))
        found = [output.finish_reason async for _, output in stream]
        with pytest.raises(NotReadyError):
            await runtime.submit([request(4, model="moa")])
        await draining
        return found

    with councils(members, monkeypatch) as runtime:
        assert asyncio.run(drained(runtime))[-1] == "length"


def test_the_places_of_a_council_are_taken_at_once_and_given_back(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crowded(runtime: Runtime) -> None:
        members["alpha"].gate.clear()
        stream = await runtime.submit([request(4, model="poll")])
        with pytest.raises(QueueFullError):
            await runtime.submit([request(4, model="poll")])
        members["alpha"].gate.set()
        async for _ in stream:
            pass
        await asyncio.sleep(0.05)
        async for _ in await runtime.submit([request(4, model="poll")]):
            pass
        with pytest.raises(InvalidRequestError, match="asks 6 models at the same time"):
            await runtime.submit([request(4, model="poll")] * 2)

    with councils(members, monkeypatch, max_running=1, max_waiting=4) as runtime:
        asyncio.run(crowded(runtime))


def test_a_client_of_a_council_that_leaves_frees_everything(
    members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave(runtime: Runtime) -> None:
        stream = await runtime.submit([request(200, model="poll"), request(200, model="moa")][:1])
        await asyncio.sleep(0.05)
        await stream.aclose()
        await asyncio.sleep(0.05)

    with councils(members, monkeypatch) as runtime:
        asyncio.run(leave(runtime))
        wait_empty(members)
        wait(lambda: runtime._num_reserved == 0)


def test_a_failed_member_is_left_out_of_a_vote(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    with councils(members, monkeypatch) as runtime:
        members["alpha"].fails_on = set(range(100))
        (outputs,) = asyncio.run(read(runtime, request(6, model="poll"))).values()
        assert outputs[-1].served_by == "beta"
        assert outputs[-1].report is not None
        assert [call.outcome for call in outputs[-1].report.calls] == ["length", "failed", "failed"]


def test_tokens_of_a_council_are_refused_by_name(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    with councils(members, monkeypatch) as runtime:
        with pytest.raises(InvalidRequestError, match=r"council.*name one of \['duo', 'beta'\]"):
            asyncio.run(runtime.tokenize("poll", "abc"))
        tightest = asyncio.run(runtime.tightest("poll", "abc"))
        assert tightest.room == min(asyncio.run(runtime.tokenize(name, "abc")).room for name in ("duo", "beta"))

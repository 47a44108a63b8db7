"""Members and recipes that come and go over an engine of fakes: who waits, who is refused, who goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes import FakeMaker, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary

from ensemble_core import factory
from ensemble_core.assembly import Loaded
from ensemble_core.config import Config
from ensemble_core.decoding.forms import one_of
from ensemble_core.decoding.requests import GenerationRequest, Output, Overrides
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import (
    ChangeConflictError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    MemberAwayError,
    ModelNotFoundError,
)
from ensemble_core.runtime import Runtime
from ensemble_core.stats import CacheStats, Record, Stats

DUO = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha"}
POLL = {"kind": "vote", "models": {"duo": 2, "beta": 1}, "answer": "exact"}
MOA = {"kind": "graph", "nodes": {"a": "alpha", "end": "duo"}, "edges": [["a", "end"]]}


class Stage:
    """A runtime over fakes, and what they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
        self.members = {
            "alpha": FakeMember("alpha", byte_vocabulary(), seed=1),
            "beta": FakeMember("beta", pair_vocabulary(), seed=2),
        }
        for name, section in config.members.items():
            if section.base is not None:
                self.members[name] = FakeMember(name, self.members[section.base].vocabulary, seed=3)
        self.records: list[Stats] = []

        def load(config: Config, record: Record) -> Loaded:
            return fake_loaded(config, self.members, record)

        monkeypatch.setattr(factory, "load", load)
        self.runtime = Runtime(config, self.records.append)
        self.changes = self.runtime.changes

    @property
    def maker(self) -> FakeMaker:
        maker = self.runtime.loaded().maker
        assert isinstance(maker, FakeMaker)
        return maker

    async def text(self, *requests: GenerationRequest) -> str:
        return "".join([output.text async for _, output in await self.runtime.submit(requests)])

    async def begun(self, request: GenerationRequest) -> asyncio.Task[list[Output]]:
        """A request whose member is held at its gate, so that it stays under way."""
        for member in self.members.values():
            member.entered.clear()
            member.gate.clear()
        stream = await self.runtime.submit([request])
        await asyncio.to_thread(self.members["alpha"].entered.wait, 5.0)

        async def read() -> list[Output]:
            return [output async for _, output in stream]

        return asyncio.create_task(read())

    def go_on(self) -> None:
        for member in self.members.values():
            member.gate.set()

    def states(self) -> dict[str, str]:
        return {name: self.runtime.roster.of(name).state for name in self.runtime.loaded().config.members}


@contextmanager
def stage(monkeypatch: pytest.MonkeyPatch, members: Any = None, **sections: Any) -> Iterator[Stage]:
    config = fake_config(**({"ensembles": {"duo": DUO, "poll": POLL, "moa": MOA}} | sections))
    made = Stage(monkeypatch, config if members is None else config.replaced(members=members))
    made.runtime.start()
    made.runtime.wait_ready()
    try:
        yield made
    finally:
        made.go_on()
        made.runtime.stop()


def play(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Stage], Coroutine[Any, Any, None]], **sections: Any
) -> None:
    with stage(monkeypatch, **sections) as made:
        asyncio.run(asyncio.wait_for(act(made), 30.0))


def request(max_tokens: int = 8, model: str = "duo", **overrides: Any) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest("r", model, "abc", params, Overrides(**overrides))


def test_a_member_goes_and_comes_back_and_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        alone = await on.text(request(model="alpha"))
        report = await on.changes.unload("beta")
        assert (report.standing.state, report.memory, report.num_requests) == ("unloaded", {}, 0)
        lacking = {model.name: dict(model.lacks) for model in on.runtime.models()}
        assert lacking == {name: {"beta": "unloaded"} for name in ("duo", "poll", "moa", "beta")} | {"alpha": {}}
        for model in ("duo", "poll", "moa", "beta"):
            with pytest.raises(MemberAwayError, match=f"'{model}' lacks the member 'beta'"):
                await on.text(request(model=model))
        assert await on.text(request(model="alpha")) == alone
        assert await on.text(request(members=("alpha",))) == alone, "a subset that is there is served"
        assert (await on.changes.load("beta")).standing.state == "ready"
        assert await on.text(request())
        assert await on.text(request(model="moa"))
        assert await on.text(request(model="alpha")) == alone
        last = [each for each in on.records if isinstance(each, CacheStats) and each.member == "beta"]
        assert {0, 1024} <= {sum(each.memory_bytes.values()) for each in last}

    play(monkeypatch, act)


@pytest.mark.parametrize("model", ["duo", "moa"])
def test_what_is_under_way_ends_first(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """A council too, though its later calls come while the member drains."""

    async def act(on: Stage) -> None:
        reading = await on.begun(request(6, model=model))
        leaving = asyncio.create_task(on.changes.unload("beta"))
        await asyncio.sleep(0.1)
        assert on.states()["beta"] == "draining"
        on.go_on()
        outputs = await reading
        assert outputs[-1].finish_reason == "length"
        assert (await leaving).standing.state == "unloaded"

    play(monkeypatch, act)


def test_no_new_request_comes_to_a_member_that_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        reading = await on.begun(request(60))
        leaving = asyncio.create_task(on.changes.unload("beta"))
        await asyncio.sleep(0.05)
        late = [asyncio.create_task(on.text(request(model=model))) for model in ("duo", "moa", "alpha")]
        await asyncio.sleep(0.05)
        on.go_on()
        found = await asyncio.gather(*late, return_exceptions=True)
        assert [isinstance(each, MemberAwayError) for each in found] == [True, True, False]
        assert (await reading)[-1].finish_reason == "length"
        await leaving

    play(monkeypatch, act)


@pytest.mark.parametrize(
    ("policy", "force", "reason"),
    [("fail", False, "error"), ("drop", False, "error"), ("fail", True, "error"), ("drop", True, "length")],
)
def test_what_has_not_ended_in_time_is_ended_by_name(
    monkeypatch: pytest.MonkeyPatch, policy: str, force: bool, reason: str
) -> None:
    """The recipe's own policy counts only where the admin says so."""

    async def act(on: Stage) -> None:
        reading = await on.begun(request(200))
        leaving = asyncio.create_task(on.changes.unload("beta", 0.0, force=force))
        await asyncio.sleep(0.1)
        on.go_on()
        await leaving
        last = (await reading)[-1]
        assert last.finish_reason == reason
        if reason == "error":
            assert "member 'beta' is taken out of service" in (last.error or "")
        else:
            assert last.dropped == {"beta": "unloaded"}
        assert all(member.is_empty for member in on.members.values())

    play(monkeypatch, act, ensembles={"duo": {**DUO, "on_member_failure": policy}})


def test_sleep_and_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        before = await on.text(request())
        report = await on.changes.sleep("beta")
        assert (report.standing.state, report.memory) == ("asleep", {"cpu": 512})
        assert on.members["beta"].asleep
        with pytest.raises(MemberAwayError, match="asleep"):
            await on.text(request())
        assert (await on.changes.sleep("beta")).standing.state == "asleep", "again: nothing happens"
        assert (await on.changes.wake("beta")).memory == {"cpu": 1024}
        assert (await on.changes.wake("beta")).standing.state == "ready"
        assert await on.text(request()) == before
        assert on.maker.made == [], "nothing was loaded"
        await on.changes.sleep("beta")
        assert (await on.changes.load("beta")).standing.state == "ready", "who sleeps is woken"
        await on.changes.sleep("beta")
        assert (await on.changes.unload("beta")).memory == {}
        for change in (on.changes.sleep, on.changes.wake):
            with pytest.raises(ChangeConflictError, match="load it"):
                await change("beta")  # type: ignore[operator]

    play(monkeypatch, act)


def test_a_wake_that_fails_leaves_it_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        await on.changes.sleep("beta")
        on.members["beta"].broken_calls["wake"] = RuntimeError("no room on the device")
        with pytest.raises(Exception, match="no room on the device"):
            await on.changes.wake("beta")
        assert on.runtime.roster.of("beta").failure == "RuntimeError: no room on the device"
        on.members["beta"].broken_calls.clear()
        assert (await on.changes.wake("beta")).standing.failure is None

    play(monkeypatch, act)


def test_one_change_at_a_time_and_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        await on.changes.unload("beta")
        on.maker.gate.clear()
        loading = asyncio.create_task(on.changes.load("beta"))
        await asyncio.sleep(0.05)
        assert on.states()["beta"] == "loading"
        assert (await on.changes.report()).change == "load of beta"
        others = (on.changes.unload("alpha"), on.changes.load("beta"), on.changes.put_recipe("trio", DUO))
        for other in others:
            with pytest.raises(ChangeConflictError, match="load of beta is under way"):
                await other
        assert await on.text(request(model="alpha")), "others are served meanwhile"
        loading.cancel()  # its caller goes away
        on.maker.gate.set()
        for _ in range(100):
            if on.states()["beta"] == "ready":
                break
            await asyncio.sleep(0.02)
        assert on.states()["beta"] == "ready"
        assert await on.text(request())

    play(monkeypatch, act)


def test_a_load_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        await on.changes.unload("beta")
        on.maker.fails = CheckpointError("the weights are gone")
        with pytest.raises(CheckpointError, match="the weights are gone"):
            await on.changes.load("beta")
        assert on.runtime.roster.of("beta").failure == "the weights are gone"
        on.maker.fails = CheckpointError("no such folder")
        with pytest.raises(CheckpointError):
            await on.changes.load("gamma", {"model": "fake-gamma"})
        assert set(on.states()) == {"alpha", "beta"}
        assert await on.text(request(model="alpha"))
        assert (await on.changes.load("beta")).standing.failure is None

    play(monkeypatch, act)


def test_a_member_is_declared_and_serves_in_a_new_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        for wrong, words in (({"model": ""}, "members.gamma.model"), ({"modle": "x"}, "members.gamma.modle")):
            with pytest.raises(InvalidRequestError, match=words):
                await on.changes.load("gamma", wrong)
        with pytest.raises(InvalidRequestError, match="declared otherwise"):
            await on.changes.load("beta", {"model": "another"})
        with pytest.raises(ModelNotFoundError, match="not declared"):
            await on.changes.load("gamma")
        assert (await on.changes.load("gamma", {"model": "fake-gamma"})).models == ("gamma",)
        assert await on.text(request(model="gamma"))
        recipe = {"members": {"gamma": 1, "beta": 1}, "main": "gamma", "fusion": "projection"}
        assert not await on.changes.put_recipe("pair", recipe)
        assert await on.text(request(model="pair"))
        assert await on.changes.put_recipe("pair", {**recipe, "main": "beta"})
        await on.changes.unload("gamma")
        assert {m.name for m in on.runtime.models() if m.lacks} == {"gamma", "pair"}

    play(monkeypatch, act)


@pytest.mark.parametrize(
    ("name", "section", "words"),
    [
        ("trio", {"members": {"nobody": 1}, "main": "nobody"}, "ensembles.trio.members: .*nobody"),
        ("trio", {**DUO, "fusion": "magic"}, "ensembles.trio.fusion.name: unknown fusion 'magic'"),
        ("trio", {**DUO, "sort": 1}, "ensembles.trio.sort"),
        ("alpha", DUO, "a member has this name already"),
        ("no way", DUO, "ensembles.no way"),
        ("duo", {"kind": "vote", "models": {"duo": 1}, "answer": "exact"}, "circle"),
        ("poll", {**POLL, "limits": {"max_calls": 1}}, "max_calls"),
    ],
)
def test_recipes_are_checked_as_the_file_is(
    monkeypatch: pytest.MonkeyPatch, name: str, section: dict[str, Any], words: str
) -> None:
    async def act(on: Stage) -> None:
        before = on.runtime.models()
        with pytest.raises(InvalidRequestError, match=words):
            await on.changes.put_recipe(name, section)
        assert on.runtime.models() == before
        assert await on.text(request(model="duo"))

    play(monkeypatch, act)


def test_requests_end_with_the_recipe_that_they_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        whole = await on.text(request(20, model="moa"))
        reading = await on.begun(request(20, model="moa"))
        changing = asyncio.create_task(on.changes.delete_recipe("moa"))
        await asyncio.sleep(0.05)
        on.go_on()
        await changing
        assert "".join(output.text for output in await reading) == whole
        with pytest.raises(ModelNotFoundError):
            await on.text(request(model="moa"))
        with pytest.raises(InvalidRequestError, match=r"\['duo'\] are neither members nor ensembles"):
            await on.changes.delete_recipe("duo")  # poll calls it
        with pytest.raises(ModelNotFoundError, match="recipe 'nobody'"):
            await on.changes.delete_recipe("nobody")

    play(monkeypatch, act)


def changed(on: Stage, **sections: Any) -> Callable[[], Config]:
    """What the file says now: as the configuration that serves, but for some sections."""
    config = on.runtime.loaded().config
    return lambda: config.replaced(**sections)


def test_a_file_that_is_read_again_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        config = on.runtime.loaded().config
        before = await on.text(request(model="alpha"))
        await on.changes.put_recipe("passing", DUO)
        reading = await on.begun(request(60, model="beta"))
        members = {
            "alpha": config.members["alpha"],
            "beta": {"model": "fake-beta", "max_len": 128},
            "gamma": {"model": "fake-gamma"},
        }
        recipes = {
            "duo": {**DUO, "main": "beta"},
            "three": {"members": dict.fromkeys(members, 1), "main": "gamma"},
        }
        scheduler = {"max_waiting": 3, "max_stretch": 3.0}
        read = changed(on, members=members, ensembles=recipes, scheduler=scheduler)
        reloading = asyncio.create_task(on.changes.reload(read))
        await asyncio.sleep(0.1)
        on.go_on()
        found = await reloading
        assert (await reading)[-1].finish_reason == "length", "what used the member before has ended first"
        assert (found.gone, found.new, found.changed) == ((), ("gamma",), ("beta",))
        assert set(found.recipes) == {"duo", "poll", "moa", "passing", "three"}
        assert found.fields == ("scheduler.max_waiting", "scheduler.max_stretch")
        names = [model.name for model in on.runtime.models()]
        assert names == ["duo", "three", "alpha", "beta", "gamma"]
        assert on.states() == dict.fromkeys(members, "ready")
        for model in ("duo", "three", "beta", "gamma"):
            assert await on.text(request(model=model))
        assert await on.text(request(model="alpha")) == before
        with pytest.raises(InvalidRequestError, match=r"max_waiting.*got 4"):
            await on.runtime.submit([request() for _ in range(4)])
        with pytest.raises(ModelNotFoundError):
            await on.text(request(model="passing"))

    play(monkeypatch, act)


def test_members_that_the_file_has_no_more_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        config = on.runtime.loaded().config
        await on.changes.sleep("beta")
        await on.changes.reload(changed(on, members={"alpha": config.members["alpha"]}, ensembles={}))
        assert [model.name for model in on.runtime.models()] == ["alpha"]
        with pytest.raises(ModelNotFoundError):
            on.runtime.roster.of("beta")
        assert await on.text(request(model="alpha"))
        await on.changes.load("beta", {"model": "fake-beta"})
        assert await on.text(request(model="beta"))

    play(monkeypatch, act)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"server": {"port": 9}}, r"server.port: cannot be changed without a restart"),
        ({"server": {"host": "0.0.0.0", "api_keys": ["k"]}}, r"server.host, server.api_keys: cannot"),
        ({"server": {"limits": {"keep_alive_seconds": 5}}}, "server.limits.keep_alive_seconds"),
        ({"scheduler": {"num_candidates": 9, "max_waiting": 9}}, "scheduler.num_candidates: cannot"),
        ({"matrices": {"top_k": 3}}, "matrices.top_k"),
        ({"deterministic": True}, "deterministic: cannot"),
        ({"ensembles": {"duo": {**DUO, "fusion": "magic"}}}, "ensembles.duo.fusion.name"),
        ({"ensembles": {"duo": {"members": {"x": 1}, "main": "x"}}}, "ensembles.duo.members"),
    ],
)
def test_a_file_that_cannot_be_served_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], words: str
) -> None:
    async def act(on: Stage) -> None:
        before = on.runtime.models()
        with pytest.raises(ConfigError, match=words):
            await on.changes.reload(changed(on, **sections))
        assert on.runtime.models() == before
        assert on.maker.made == []
        assert await on.text(request())

    play(monkeypatch, act)


def test_a_member_that_cannot_be_loaded_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        config = on.runtime.loaded().config
        members = {**config.members, "beta": {"model": "other"}, "gamma": {"model": "fake-gamma"}}
        before = await on.text(request())
        on.maker.fails = CheckpointError("no weights")
        with pytest.raises(ConfigError, match=r"members\.(gamma|beta): no weights"):
            await on.changes.reload(changed(on, members=members, scheduler={"max_waiting": 4}))
        assert set(on.states().items()) == {("alpha", "ready"), ("beta", "ready")}
        assert await on.text(request()) == before
        assert len([o async for _, o in await on.runtime.submit([request(1), request(1)])]) == 2

    play(monkeypatch, act)


FAMILY = {
    "alpha": {"model": "fake-alpha"},
    "poet": {"base": "alpha", "adapter": "fake-poet"},
    "beta": {"model": "fake-beta"},
}


def test_a_base_stays_while_adapters_share_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        expected = {name: await on.text(request(model=name)) for name in FAMILY}
        for leave in (on.changes.unload, on.changes.sleep):
            with pytest.raises(
                ChangeConflictError, match="'alpha' shares its weights with the adapters poet; unload"
            ):
                await leave("alpha", force=True)
        await on.changes.sleep("poet")
        with pytest.raises(ChangeConflictError, match="unload those first"):
            await on.changes.unload("alpha")
        assert on.states() == {"alpha": "ready", "poet": "asleep", "beta": "ready"}
        await on.changes.unload("poet")
        assert await on.text(request(model="alpha")) == expected["alpha"], "it serves without its adapter"
        await on.changes.sleep("alpha")
        with pytest.raises(
            ChangeConflictError, match="'poet' shares the weights of 'alpha', which is asleep; wake"
        ):
            await on.changes.load("poet")
        await on.changes.unload("alpha")
        for section in (None, {"base": "alpha", "adapter": "fake-poet"}):
            with pytest.raises(ChangeConflictError, match="which is unloaded; load 'alpha' first"):
                await on.changes.load("poet" if section is None else "critic", section)
        assert on.states() == {"alpha": "unloaded", "poet": "unloaded", "beta": "ready"}
        for name in ("alpha", "poet"):
            await on.changes.load(name)
        assert set(on.states().values()) == {"ready"}
        assert await on.text(request(model="poet"))

    play(monkeypatch, act, members=FAMILY)


def test_an_adapter_is_declared_on_a_base_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        await on.changes.load("critic", {"base": "alpha", "adapter": "fake-critic"})
        loaded = on.runtime.loaded()
        assert loaded.config.members["critic"].model == "fake-alpha"
        assert on.maker.bases == {"critic": "alpha"}
        assert {model.name: model.parent for model in loaded.models if model.parent} == {
            "poet": "alpha",
            "critic": "alpha",
        }
        assert await on.text(request(model="critic"))
        with pytest.raises(InvalidRequestError, match="'poet' has no weights of its own to adapt"):
            await on.changes.load("third", {"base": "poet", "adapter": "x"})
        with pytest.raises(InvalidRequestError, match="'nobody' is not declared"):
            await on.changes.load("third", {"base": "nobody", "adapter": "x"})

    play(monkeypatch, act, members=FAMILY)


def test_a_base_that_is_declared_anew_takes_its_adapters_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Base before adapter, whatever the order in the file, and what the adapter has of its own is as it was."""

    async def act(on: Stage) -> None:
        before = await on.text(request(model="beta"))
        members = {"poet": FAMILY["poet"], **FAMILY, "alpha": {"model": "fake-alpha", "max_len": 128}}
        members["poet"] = {**members["poet"], "max_len": 64}
        found = await on.changes.reload(changed(on, members=members))
        assert (found.new, found.gone, set(found.changed)) == ((), (), {"alpha", "poet"})
        assert [member.name for member in on.maker.made] == ["alpha", "poet"]
        assert on.maker.bases == {"poet": "alpha"}
        assert set(on.states().values()) == {"ready"}
        members["alpha"] = {"model": "fake-alpha", "max_len": 100}
        found = await on.changes.reload(changed(on, members=members))
        assert set(found.changed) == {"alpha", "poet"}, "its own section is the same, its weights are not"
        found = await on.changes.reload(changed(on, members={"beta": members["beta"]}, ensembles={}))
        assert set(found.gone) == {"alpha", "poet"}
        assert await on.text(request(model="beta")) == before

    play(monkeypatch, act, members=FAMILY)


def test_a_file_with_an_adapter_whose_base_is_away_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        await on.changes.unload("poet")
        await on.changes.sleep("alpha")
        members = {**FAMILY, "critic": {"base": "alpha", "adapter": "fake-critic"}}
        with pytest.raises(
            ConfigError, match=r"members\.critic: member 'critic' shares.*'alpha', which is asleep"
        ):
            await on.changes.reload(changed(on, members=members))
        assert on.states() == {"alpha": "asleep", "poet": "unloaded", "beta": "ready"}

    play(monkeypatch, act, members=FAMILY)


def test_reasoning_of_a_member_that_comes_later_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(on: Stage) -> None:
        marks = {"start": "<think>", "end": "</think>"}
        await on.changes.load("gamma", {"model": "fake-gamma", "reasoning": marks})
        thinking = on.runtime.loaded().voices["gamma"].speaker.thinking
        assert thinking is not None
        assert thinking.marks.end == "</think>"
        assert on.runtime.loaded().voices["alpha"].speaker.thinking is None

    play(monkeypatch, act)


def test_forms_bind_members_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the process that tries them out knows the vocabularies of those that are declared, and no others."""

    async def act(on: Stage) -> None:
        def asked(model: str) -> GenerationRequest:
            params = SamplingParams(max_tokens=8, temperature=0.0, form=one_of(["yes", "no"]))
            return GenerationRequest("r", model, "abc", params)

        trial = on.runtime._workshop._trial
        assert await on.text(asked("beta")) in ("yes", "no")
        await on.changes.load("gamma", {"model": "fake-gamma"})
        assert await on.text(asked("gamma")) in ("yes", "no")
        keys = {name: voice.speaker.grammars.key for name, voice in on.runtime.loaded().voices.items()}
        assert trial._known == {keys["beta"], keys["gamma"]}
        config = on.runtime.loaded().config
        members = {name: config.members[name] for name in ("alpha", "beta")}
        await on.changes.reload(changed(on, members=members))
        assert await on.text(asked("alpha")) in ("yes", "no")
        assert trial._known == {keys["alpha"], keys["beta"]}

    play(monkeypatch, act)

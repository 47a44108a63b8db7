"""Tools through admission, engine and councils over fake members: calls are valid, streamed, counted."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import Bench, FakeMember, byte_vocabulary, fake_config, fake_loaded, pair_vocabulary
from scripted_engine import ScriptedEngine, council, whole
from tool_cases import ARGS_TOOLS, WEATHER, check_call, random_tools

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import Conversation, GenerationRequest, Output, join
from ensemble_core.decoding.sampling_params import SamplingParams
from ensemble_core.errors import InvalidRequestError
from ensemble_core.members.base import Abilities
from ensemble_core.text.prompt import PromptEncoder
from ensemble_core.text.tools import Tool, ToolUse, folded
from ensemble_core.text.vocabulary import Vocabulary

WEATHER_TOOL = Tool("get_weather", "The weather.", json.dumps(WEATHER))
USE = ToolUse((WEATHER_TOOL,), "required", parallel=False)
PAIR = {"members": {"alpha": 0.5, "beta": 0.5}, "main": "alpha"}
LINEAR = {"name": "projection", "options": {"pool": "linear"}}
ENSEMBLES: dict[str, Any] = {
    "duo": PAIR,
    "drafted": PAIR | {"mode": "verify"},
    "drawn": PAIR | {"mode": "sampled", "fusion": LINEAR},
}
TURN = {"role": "user", "content": "abc"}


def bench(main: Vocabulary | None = None, **alpha: Any) -> Bench:
    members = {
        "alpha": FakeMember("alpha", main or byte_vocabulary(), **({"max_len": 4096, "eos_bias": 2.0} | alpha)),
        "beta": FakeMember("beta", pair_vocabulary(), seed=1, max_len=4096),
    }
    return Bench(fake_loaded(fake_config(ensembles=ENSEMBLES), members), members)


def request(use: ToolUse | None, rank: int = 0, model: str = "duo", **params: Any) -> GenerationRequest:
    own = SamplingParams(**({"max_tokens": 600, "temperature": 1.0, "seed": rank} | params))
    return GenerationRequest(f"r-{rank}", model, Conversation((TURN,), tools=use), own, group="g")


def answers(found: Bench, requests: Sequence[GenerationRequest]) -> list[list[Output]]:
    """All outputs of each request."""
    sequences = found.loaded.admission.admit_all(requests)
    found.engine.add(sequences)
    found.run()
    return [found.outputs[sequence.seq_id] for sequence in sequences]


@pytest.mark.parametrize("model", ["alpha", *ENSEMBLES])
def test_the_choices_of_a_request_call_tools_each_in_its_own_way(model: str) -> None:
    found = answers(bench(), [request(USE, rank, model) for rank in range(4)])
    told = [join(outputs) for outputs in found]
    for output in told:
        (call,) = folded(output.calls)
        check_call(call, USE)
        assert (output.text, output.finish_reason, output.stop_reason) == ("", "tool_calls", None)
    assert len({call.arguments for output in told for call in folded(output.calls)}) > 1
    assert len({call.call_id for output in told for call in folded(output.calls)}) == 4


def test_random_tools_are_called_validly() -> None:
    rng = random.Random(7)
    for rank in range(3):
        use = ToolUse(random_tools(rng), "required", parallel=False)
        (outputs,) = answers(bench(), [request(use, rank, max_tokens=2000)])
        assert outputs[-1].finish_reason == "tool_calls"
        for call in folded(join(outputs).calls):
            check_call(call, use)


def test_arguments_stream_as_they_come() -> None:
    (outputs,) = answers(bench(), [request(USE, 3)])
    pieces = [piece for output in outputs for piece in output.calls]
    assert pieces[0].name == "get_weather"
    assert pieces[0].arguments == ""
    assert all(piece.name is None and piece.arguments for piece in pieces[1:])
    assert len(pieces) > 10


def test_a_call_that_is_cut_is_too_long() -> None:
    (outputs,) = answers(bench(), [request(USE, max_tokens=70)])
    (call,) = folded(join(outputs).calls)
    assert outputs[-1].finish_reason == "length"
    assert call.arguments.startswith('{"city": "')
    (outputs,) = answers(bench(), [request(USE, max_tokens=8)])
    assert (join(outputs).text, join(outputs).calls) == ("", ())  # the marker is no text


def test_every_token_has_its_log_probability() -> None:
    (outputs,) = answers(bench(), [request(USE, logprobs=1)])
    output = join(outputs)
    assert len(output.logprobs) == len(output.token_ids) == output.num_completion_tokens


def test_stop_strings_leave_calls_whole() -> None:
    (outputs,) = answers(bench(), [request(USE, stop=('"', "}", "tool"))])
    check_call(folded(join(outputs).calls)[0], USE)
    auto = replace(USE, choice="auto")
    (outputs,) = answers(bench(eos_bias=-30.0), [request(auto, stop=("a",))])
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "a")


def test_shown_tools_bind_nothing() -> None:
    plain, shown = answers(bench(), [request(None)]), answers(bench(), [request(replace(USE, choice="none"))])
    assert plain[0][0].num_prompt_tokens < shown[0][0].num_prompt_tokens
    assert not join(shown[0]).calls


def test_control_tokens_that_mark_calls_are_text_to_all_members() -> None:
    """Main writes `[TOOL_CALLS]` and `[ARGS]` as one token each; the assistant spells what they say."""
    words = byte_vocabulary()
    marks = [b"[TOOL_CALLS]", b"[ARGS]"]
    own = frozenset(range(len(words), len(words) + len(marks)))
    main = replace(words, tokens=[*words.tokens, *marks], special_ids=words.special_ids | own)
    found = bench(main)
    speaker = found.loaded.admission._speakers["alpha"]
    tokenizer = speaker.prompts._tokenizer
    tokenizer.chat_template = ARGS_TOOLS
    tokenizer.apply_chat_template = lambda messages, tools, **_: rendered(messages, tools)
    object.__setattr__(speaker, "prompts", PromptEncoder("alpha", tokenizer))
    assert speaker.prompts.call_form.name == "mistral"
    (sequence,) = found.loaded.admission.admit_all([request(USE)])
    found.engine.add([sequence])
    found.run()
    output = join(found.outputs[sequence.seq_id])
    check_call(folded(output.calls)[0], USE)
    assert own <= set(output.token_ids)
    spelt = sequence.spelling[0]
    assert spelt.startswith("[TOOL_CALLS]get_weather[ARGS]{")
    beta = found.members["beta"].vocabulary
    assert b"".join(map(beta.text_bytes, sequence.tracks["beta"].completion_ids)).decode() == spelt


def rendered(messages: Sequence[Any], tools: Any) -> str:
    calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
    written = [f"[TOOL_CALLS]{call['name']}[ARGS]{json.dumps(call['arguments'])}" for call in calls]
    return json.dumps(tools) + "".join(message["content"] for message in messages) + "".join(written)


def test_a_schema_at_fault_is_named_before_anything_runs() -> None:
    bad = Tool("bad", "", '{"properties": {"a": {"type": "frob"}}}')
    with pytest.raises(InvalidRequestError, match=r"tools\.1\.function\.parameters: .*frob"):
        bench().loaded.admission.admit_all([request(ToolUse((WEATHER_TOOL, bad)))])


def test_calls_need_whole_distributions_of_main() -> None:
    found = bench(abilities=Abilities(max_k=20))
    with pytest.raises(InvalidRequestError, match="tools needs whole distributions, and member 'alpha'"):
        found.loaded.admission.admit_all([request(USE)])
    assert found.loaded.admission.admit_all([request(replace(USE, choice="none"))])


def test_what_has_a_form_may_call_as_well() -> None:
    use = replace(USE, choice="auto")
    form = TextForm("json", '{"enum": ["yes", "no"]}')
    for outputs in answers(bench(), [request(use, rank, form=form) for rank in range(3)]):
        output = join(outputs)
        assert bool(output.calls) != (output.text in ('"yes"', '"no"'))


MEMBERS = {"members": {name: {"model": f"fake-{name}"} for name in ("alpha", "beta")}}
KINDS: dict[str, dict[str, Any]] = {
    "route": council("route", models=["alpha", "beta"], by="fixed"),
    "vote": council("vote", models=["alpha", "beta"], answer="exact"),
    "discuss": council("discuss", models=["alpha", "beta"]),
    "over": council("route", models=["alpha", "vote"], by="fixed"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_of_councils_routes_to_models_call_tools(kind: str) -> None:
    config = fake_config(("alpha", "beta"), ensembles=KINDS)
    engine = ScriptedEngine(lambda _: "yes")
    asked = [request(USE, model=kind)]
    if kind == "route":
        asyncio.run(whole(engine.chamber(config), asked))
        assert engine.seen[0].prompt == asked[0].prompt
        return
    with pytest.raises(InvalidRequestError, match=f"tools: the answer of '{kind}'") as caught:
        asyncio.run(whole(engine.chamber(config), asked))
    assert caught.value.param == "tools"

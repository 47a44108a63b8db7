"""Councils over a scripted engine: who is asked what, what is answered, and that no limit is passed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes import fake_config
from scripted_engine import Failure, Script, ScriptedEngine, as_json, asked, council, text_of, whole

from ensemble_core.config import Config
from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.requests import Conversation, CouncilBounds, GenerationRequest, Output, Overrides
from ensemble_core.errors import (
    CouncilError,
    InvalidRequestError,
    NotReadyError,
    QueueFullError,
    RequestTimeoutError,
)
from ensemble_core.stats import CouncilStats

Answer = Callable[[GenerationRequest], Script]
QUESTION = Conversation(({"role": "user", "content": "What is 6 x 7?"},))


def config(**councils: dict[str, Any]) -> Config:
    duo = {"members": {"alpha": 1, "beta": 1}, "main": "alpha"}
    return fake_config(("alpha", "beta", "gamma"), ensembles={"duo": duo, **councils})


def says(**texts: Script) -> Answer:
    return lambda request: texts[request.model]


def run(engine: ScriptedEngine, settings: Config, requests: list[GenerationRequest]) -> list[Output]:
    found = asyncio.run(whole(engine.chamber(settings), requests))
    assert engine.num_places == 0, "places were not given back"
    assert engine.num_open == 0
    return found


def models(engine: ScriptedEngine) -> list[str]:
    return [request.model for request in engine.seen]


def test_fixed_asks_the_first_that_works_and_passes_the_request_through() -> None:
    settings = config(smart=council("route", models=["alpha", "beta"], by="fixed", fallback="duo"))
    engine = ScriptedEngine(says(alpha="six times seven"))
    requests = asked("smart", QUESTION, temperature=0.5, logprobs=2)
    (answer,) = run(engine, settings, requests)
    assert (answer.text, answer.served_by) == ("six times seven", "alpha")
    (seen,) = engine.seen
    assert (seen.model, seen.prompt, seen.params) == ("alpha", QUESTION, requests[0].params)
    assert answer.report is not None
    assert [(call.model, call.outcome) for call in answer.report.calls] == [("alpha", "stop")]

    engine = ScriptedEngine(says(alpha=CouncilError("down"), beta=Failure(), duo="42"))
    (answer,) = run(engine, settings, asked("smart"))
    assert (answer.text, answer.served_by) == ("42", "duo")
    assert models(engine) == ["alpha", "beta", "duo"]
    assert answer.report is not None
    assert [call.outcome for call in answer.report.calls] == ["failed", "failed", "stop"]


def test_a_model_that_fails_in_mid_answer_is_not_replaced() -> None:
    settings = config(smart=council("route", models=["alpha", "beta"], by="fixed"))
    engine = ScriptedEngine(says(alpha=Failure(("six", " times")), beta="42"))
    with pytest.raises(CouncilError, match="the member broke"):
        run(engine, settings, asked("smart"))
    assert models(engine) == ["alpha"]


def test_majority_wins_and_the_first_of_its_texts_is_sent() -> None:
    settings = config(poll=council("vote", models={"alpha": 2, "beta": 3}, answer="number"))

    def answer(request: GenerationRequest) -> Script:
        sample = int(request.request_id.rpartition("/")[2])
        return f"I say {41 + sample}" if request.model == "alpha" else "It is 42."

    engine = ScriptedEngine(answer)
    (found,) = run(engine, settings, asked("poll"))
    assert found.text == "I say 42"  # alpha's second sample came first in order
    assert found.served_by == "alpha"
    assert found.report is not None
    trace = found.report.trace["poll"]
    assert trace["votes"] == {"41": ["alpha#0"], "42": ["alpha#1", "beta#0", "beta#1", "beta#2"]}
    (stats,) = [each for each in engine.stats if isinstance(each, CouncilStats)]
    assert stats.agreement == pytest.approx(0.8)
    assert len(stats.calls) == 5
    seeds = {request.params.seed for request in engine.seen}
    assert len(seeds) == 5, "each sample has a seed of its own"


def test_the_same_seed_gives_the_same_calls_whatever_ends_first() -> None:
    settings = config(poll=council("vote", models={"alpha": 3, "beta": 2}, answer="number", stop_early=True))

    def told(pauses: list[float]) -> tuple[str, str]:
        def answer(request: GenerationRequest) -> Script:
            return f"{abs(request.params.seed or 0) % 2}"

        def pause(request: GenerationRequest) -> float:
            return pauses[engine.seen.index(request) % len(pauses)]

        engine = ScriptedEngine(answer, pause)
        (found,) = run(engine, settings, asked("poll"))
        return found.text, found.served_by

    texts = {told([0.0]), told([0.03, 0.0, 0.01]), told([0.0, 0.02]), told([0.02, 0.01, 0.0])}
    assert len(texts) == 1


def test_early_stopping_ends_the_samples_that_cannot_change_anything() -> None:
    settings = config(poll=council("vote", models={"alpha": 7}, answer="exact", stop_early=True))
    slow = 4  # the first four agree

    def pause(request: GenerationRequest) -> float:
        return 0.0 if int(request.request_id.rpartition("/")[2]) < slow else 5.0

    engine = ScriptedEngine(lambda _request: "yes", pause)
    (found,) = run(engine, settings, asked("poll"))
    assert found.text == "yes"
    assert len(engine.ended) == 3
    assert found.report is not None
    assert [call.outcome for call in found.report.calls].count("ended early") == 3


def test_ties_go_to_the_first_or_to_the_likeliest() -> None:
    for tie, expected in (("first", "1"), ("likeliest", "1")):
        settings = config(poll=council("vote", models=["alpha", "beta"], answer="number", tie=tie))
        (found,) = run(ScriptedEngine(says(alpha="1", beta="2")), settings, asked("poll"))
        assert found.text == expected


@pytest.mark.parametrize(("p", "expected"), [(0.6, 0.683), (0.7, 0.837), (0.4, 0.317)])
def test_five_votes_are_as_right_as_the_binomial_says(p: float, expected: float) -> None:
    """500 votes of five; three standard deviations are allowed."""
    settings = config(poll=council("vote", models={"alpha": 5}, answer="choice"))
    num = 500

    async def ask_all() -> int:
        def answer(request: GenerationRequest) -> Script:
            draw = (abs(request.params.seed or 0) % 1_000_003) / 1_000_003
            return "The answer is A" if draw < p else "The answer is B"

        engine = ScriptedEngine(answer)
        chamber = engine.chamber(settings)
        answers = [(await whole(chamber, asked("poll", seed=seed * 7)))[0] for seed in range(num)]
        return sum(each.text.endswith("A") for each in answers)

    right = asyncio.run(ask_all())
    assert abs(right / num - expected) < 3 * math.sqrt(expected * (1 - expected) / num) + 0.0005


def test_a_judge_compares_in_both_orders() -> None:
    settings = config(best=council("vote", models=["alpha", "beta"], by="judge", judge="gamma"))

    def answer(request: GenerationRequest) -> Script:
        if request.model != "gamma":
            return f"text of {request.model}"
        assert request.params.max_tokens == 1
        assert isinstance(request.prompt, Conversation)
        assert request.prompt.continue_final
        text = request.prompt.messages[0]["content"]
        first = text.index("text of beta") < text.index("text of alpha")
        return "A" if first else "B"

    engine = ScriptedEngine(answer)
    (found,) = run(engine, settings, asked("best", QUESTION))
    assert (found.text, found.served_by) == ("text of beta", "beta")
    assert models(engine).count("gamma") == 2


def test_a_graph_hands_on_what_was_said() -> None:
    nodes = {"a": "alpha", "b": {"model": "beta", "role": "You check numbers."}, "end": "duo"}
    settings = config(moa=council("graph", nodes=nodes, edges=[["a", "b"], ["a", "end"], ["b", "end"]]))
    engine = ScriptedEngine(says(alpha="about forty", beta="42 I think", duo="It is 42."))
    (found,) = run(engine, settings, asked("moa", QUESTION, stop=("x",), logprobs=1))
    assert (found.text, found.served_by) == ("It is 42.", "duo")
    first, second, last = engine.seen
    assert first.prompt == QUESTION
    assert isinstance(second.prompt, Conversation)
    assert second.prompt.messages[0] == {"role": "system", "content": "You check numbers."}
    assert "Previous response 1: about forty" in second.prompt.messages[1]["content"]
    assert "Previous response 2: 42 I think" in text_of(last.prompt)
    assert (first.params.stop, first.params.logprobs) == ((), None), "drafts are not cut by the client's stops"
    assert (last.params.stop, last.params.logprobs) == (("x",), 1)


def test_nodes_of_a_layer_speak_at_the_same_time() -> None:
    nodes = {"a": "alpha", "b": "beta", "c": "gamma", "end": "alpha"}
    settings = config(moa=council("graph", nodes=nodes, edges=[["a", "end"], ["b", "end"], ["c", "end"]]))
    engine = ScriptedEngine(lambda request: f"I am {request.model}", lambda _request: 0.01)
    run(engine, settings, asked("moa"))
    assert engine.most_open == 3


def test_a_node_that_fails_is_left_out_or_ends_the_request() -> None:
    graph = council("graph", nodes={"a": "alpha", "b": "beta", "end": "gamma"}, edges=[["a", "end"], ["b", "end"]])
    engine = ScriptedEngine(says(alpha=Failure(("half",)), beta="whole", gamma="done"))
    (found,) = run(engine, config(moa=graph), asked("moa"))
    assert found.text == "done"
    assert "half" not in text_of(engine.seen[-1].prompt)
    assert "Previous response 1: whole" in text_of(engine.seen[-1].prompt)
    for limits, words in (({"on_error": "fail"}, "on_error: fail"), ({"min_answers": 2}, "needs 2")):
        with pytest.raises(CouncilError, match=words):
            run(
                ScriptedEngine(says(alpha=Failure(), beta="whole", gamma="done")),
                config(moa={**graph, "limits": limits}),
                asked("moa"),
            )


def test_a_discussion_ends_where_all_agree() -> None:
    settings = config(table=council("discuss", models=["alpha", "beta"], rounds=2, answer="number"))
    opinion = as_json(reasoning="since", answer="42", confidence=0.9)
    engine = ScriptedEngine(says(alpha=opinion, beta=opinion))
    (found,) = run(engine, settings, asked("table"))
    assert found.text == "since\n\nThe answer is 42."
    assert models(engine) == ["alpha", "beta"]
    assert found.token_ids == ()


def test_an_answer_that_was_cut_is_asked_for_once_more() -> None:
    settings = config(table=council("discuss", models=["alpha", "beta"], rounds=1, answer="number"))
    opinion = as_json(reasoning="since", answer="42", confidence=0.9)

    def answer(request: GenerationRequest) -> Script:
        if request.model == "beta" and request.request_id.endswith("/0"):
            return '{"reasoning": "first I multiply'
        if request.model == "beta":
            assert "first I multiply" in text_of(request.prompt)
            return as_json(answer="42", confidence=0.5)
        return opinion

    (found,) = run(ScriptedEngine(answer), settings, asked("table"))
    assert found.text.endswith("The answer is 42.")
    assert found.report is not None
    (opinions,) = found.report.trace["table"]["rounds"]
    assert [each["answer"] for each in opinions] == ["42", "42"]
    assert opinions[1]["reasoning"] == "first I multiply"


def test_route_over_vote_over_fuse() -> None:
    settings = config(
        smart=council("route", models=["poll", "beta"], by="fixed"),
        poll=council("vote", models={"duo": 3}, answer="number"),
    )
    engine = ScriptedEngine(says(duo="42", beta="7"))
    (found,) = run(engine, settings, asked("smart", QUESTION))
    assert (found.text, found.served_by) == ("42", "duo")
    assert models(engine) == ["duo"] * 3
    assert found.report is not None
    assert {call.node for call in found.report.calls} == {"poll/duo"}
    assert found.report.trace.keys() == {"smart", "poll"}


def test_circles_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        config(
            a=council("vote", models=["b"]),
            b=council("route", models=["a", "alpha"], by="fixed"),
        )


def test_choices_are_whole_runs_within_the_limits() -> None:
    poll = council("vote", models={"alpha": 3}, answer="exact", limits={"max_calls": 6, "max_tokens": 12})
    engine = ScriptedEngine(lambda _request: "a b c d e")
    first, second = run(engine, config(poll=poll), asked("poll", count=2))
    assert len(engine.seen) == 6
    assert first.text == second.text == "a b"  # 12 tokens for six calls
    assert sum(request.params.max_tokens for request in engine.seen) <= 12
    with pytest.raises(InvalidRequestError, match="needs up to 3 calls, and a request may make 6") as caught:
        run(engine, config(poll=poll), asked("poll", count=3))
    assert caught.value.param == "n"


def test_a_request_lowers_limits_and_never_raises_them() -> None:
    settings = config(poll=council("vote", models={"alpha": 3}, limits={"max_calls": 6}))
    engine = ScriptedEngine(lambda _request: "a b c d e")

    def bounded(**bounds: Any) -> list[GenerationRequest]:
        return [replace(each, overrides=Overrides(bounds=CouncilBounds(**bounds))) for each in asked("poll")]

    (found,) = run(engine, settings, bounded(max_tokens=3))
    assert found.text == "a"
    for bounds, words in (
        ({"max_calls": 7}, "allows 6 at most"),
        ({"max_calls": 2}, "needs up to 3 calls"),
        ({"max_tokens": 2}, "share 2 tokens"),
        ({"seconds": 600.0}, "allows 60 at most"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            run(engine, settings, bounded(**bounds))


def test_time_is_a_limit_too() -> None:
    poll = council("vote", models={"alpha": 1, "beta": 1}, answer="exact", limits={"seconds": 0.2})
    slow = ScriptedEngine(lambda r: r.model, lambda r: 5.0 if r.model == "beta" else 0.0)
    (found,) = run(slow, config(poll=poll), asked("poll"))
    assert found.text == "alpha"
    assert found.report is not None
    assert [call.outcome for call in found.report.calls] == ["stop", "timeout"]
    all_slow = ScriptedEngine(lambda r: r.model, lambda _r: 5.0)
    with pytest.raises(CouncilError, match=r"longer than 0\.2 s"):
        run(all_slow, config(poll=poll), asked("poll"))
    smart = council("route", models=["alpha"], by="fixed", limits={"seconds": 0.2})
    with pytest.raises(RequestTimeoutError):
        run(ScriptedEngine(lambda _r: "a b", lambda _r: 5.0), config(smart=smart), asked("smart"))
    (cut,) = run(
        ScriptedEngine(lambda _r: "a b c d e f g h i j", lambda _r: 0.05), config(smart=smart), asked("smart")
    )
    assert cut.finish_reason == "length"
    assert cut.text.startswith("a b")


def test_places_are_taken_before_anything_is_asked() -> None:
    settings = config(poll=council("vote", models={"alpha": 3}))
    engine = ScriptedEngine(lambda _request: "yes", most_places=5)
    with pytest.raises(QueueFullError):
        run(engine, settings, asked("poll", count=2))
    assert engine.seen == []


def test_closing_the_stream_ends_every_call() -> None:
    settings = config(
        smart=council("route", models=["poll"], by="fixed"), poll=council("vote", models={"alpha": 3})
    )
    engine = ScriptedEngine(lambda _request: "a b c", lambda _request: 0.05)

    async def leave() -> None:
        stream = await engine.chamber(settings).submit(asked("smart", count=2))
        await asyncio.sleep(0.02)
        assert engine.num_open == 6
        await stream.aclose()
        await asyncio.sleep(0.05)

    asyncio.run(leave())
    assert (engine.num_open, engine.num_places) == (0, 0)
    assert len(engine.ended) == 6


def test_what_belongs_to_one_vocabulary_is_refused() -> None:
    settings = config(
        poll=council("vote", models=["alpha", "beta"]), table=council("discuss", models=["alpha", "beta"])
    )
    engine = ScriptedEngine(lambda _request: "x")
    for model, prompt, params, words in (
        ("poll", "a", {"logit_bias": ((1, 2.0),)}, "logit_bias"),
        ("poll", "a", {"allowed_token_ids": (1, 2)}, "allowed_token_ids"),
        ("poll", "a", {"stop_token_ids": (1,)}, "stop_token_ids"),
        ("poll", (1, 2), {}, "prompt: token ids"),
        ("poll", "a", {"echo": True}, "scores no prompts"),
        ("table", "a", {"logprobs": 1}, "logprobs"),
        ("table", "a", {"form": TextForm("json", field="response_format")}, "response_format"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            run(engine, settings, asked(model, prompt, **params))
    with pytest.raises(InvalidRequestError, match="limits and trace alone"):
        run(engine, settings, [replace(asked("poll")[0], overrides=Overrides(fusion="union"))])
    assert engine.seen == []


def test_what_nobody_can_serve_is_the_client_s_error() -> None:
    settings = config(poll=council("vote", models=["alpha", "beta"]))
    refusing = ScriptedEngine(lambda _request: InvalidRequestError("too long", "prompt"))
    with pytest.raises(InvalidRequestError, match="too long"):
        run(refusing, settings, asked("poll"))
    stopping = ScriptedEngine(lambda _request: NotReadyError("draining"))
    with pytest.raises(NotReadyError):
        run(stopping, settings, asked("poll"))


def test_outputs_of_the_last_call_come_as_they_are_made() -> None:
    settings = config(moa=council("graph", nodes={"a": "alpha", "end": "beta"}, edges=[["a", "end"]]))
    engine = ScriptedEngine(says(alpha="draft", beta="one two three"))

    async def pieces() -> list[tuple[str, str, bool]]:
        stream = await engine.chamber(settings).submit(asked("moa"))
        return [(o.text, o.served_by, o.report is not None) async for _, o in stream]

    assert asyncio.run(pieces()) == [("one", "beta", False), (" two", "beta", False), (" three", "beta", True)]

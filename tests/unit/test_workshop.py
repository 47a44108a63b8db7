"""Forms that cost too much are refused by a process that may die of them; the others are compiled once."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from string import ascii_lowercase

import pytest
from fakes import byte_vocabulary
from llguidance import LLParserLimits

from ensemble_core.decoding import guidance, trial
from ensemble_core.decoding.forms import TextForm, one_of
from ensemble_core.decoding.guidance import Constraint, Grammars
from ensemble_core.decoding.workshop import Workshop
from ensemble_core.errors import InvalidRequestError, QueueFullError


@pytest.fixture
def workshop() -> Iterator[Workshop]:
    made = Workshop()
    yield made
    made.close()


def chain(length: int) -> str:
    """GBNF whose conversion takes time and holds the interpreter's lock."""
    names = [
        "".join(letters) for letters in itertools.islice(itertools.product(ascii_lowercase, repeat=3), length)
    ]
    rules = (f"{name}::={after}" for name, after in itertools.pairwise(names))
    return "\n".join((f"root::={names[0]}", *rules, f'{names[-1]}::="x"'))


BOMBS = {
    "a multiple that the engine does not bound": TextForm("json", '{"type": "integer", "multipleOf": 999983}'),
    "the same in a grammar": TextForm("grammar", 'start: %json {"type": "integer", "multipleOf": 999983}'),
    "a long chain of rules": TextForm("grammar", chain(6500)),
}


def test_bombs_are_refused_and_the_next_form_is_served(workshop: Workshop) -> None:
    grammars = Grammars(byte_vocabulary())

    async def run() -> None:
        await asyncio.gather(*(workshop.prepare(grammars, form) for form in BOMBS.values()))
        await workshop.prepare(grammars, one_of(["a"]))

    asyncio.run(run())
    for name, form in BOMBS.items():
        assert grammars.knows(form), name
        with pytest.raises(InvalidRequestError, match="takes over 1 s") as caught:
            grammars.compile(TextForm(form.kind, form.source, field="guided_json"))
        assert caught.value.param == "guided_json"
    assert grammars.compile(one_of(["a"])).allowed().nonzero().flatten().tolist() == [ord("a")]


def test_what_is_prepared_is_what_would_have_been_compiled(workshop: Workshop) -> None:
    forms = [
        TextForm("json"),
        TextForm("json", '{"enum": [7]}', layout=""),
        TextForm("regex", "(ab)+"),
        TextForm("regex", "("),
        TextForm("grammar", "start: <[256]> | /a/"),
        TextForm("grammar", 'root ::= "x"'),
        TextForm("json", '{"$ref": "#"}'),
        TextForm("json", '{"type": "nonsense"}'),
    ]
    beside, alone = Grammars(byte_vocabulary()), Grammars(byte_vocabulary())

    async def run() -> None:
        for form in forms:
            await workshop.prepare(beside, form)

    asyncio.run(run())
    for form in forms:
        assert beside.knows(form)
        assert outcome(beside, form) == outcome(alone, form)


def outcome(grammars: Grammars, form: TextForm) -> object:
    try:
        return grammars.compile(form).allowed().nonzero().flatten().tolist()
    except InvalidRequestError as error:
        return str(error)


def test_a_process_that_has_died_is_started_again(workshop: Workshop) -> None:
    grammars = Grammars(byte_vocabulary())
    asyncio.run(workshop.prepare(grammars, TextForm("regex", "a")))
    process = workshop._trial._process
    assert process is not None
    process.kill()
    process.wait()
    asyncio.run(workshop.prepare(grammars, TextForm("regex", "b")))
    assert grammars.compile(TextForm("regex", "b")).allowed()[ord("b")]


def test_the_queue_is_bounded(workshop: Workshop) -> None:
    grammars = Grammars(byte_vocabulary())

    async def run() -> list[object]:
        forms = [TextForm("regex", f"a{i}") for i in range(60)]
        return await asyncio.gather(*(workshop.prepare(grammars, form) for form in forms), return_exceptions=True)

    found = asyncio.run(run())
    assert [type(each) for each in found].count(QueueFullError) == 60 - 32


def test_a_form_is_compiled_once_and_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[TextForm] = []
    original = Grammars._built
    monkeypatch.setattr(
        Grammars, "_built", lambda self, form, text: built.append(form) or original(self, form, text)
    )
    monkeypatch.setattr(guidance, "_NUM_KEPT", 2)
    grammars, forms = Grammars(byte_vocabulary()), [TextForm("regex", text) for text in "abc"]
    for form in (forms[0], forms[0], forms[1], forms[0], forms[2], forms[0], forms[1]):
        grammars.compile(form)
    assert built == [*forms, forms[1]]


def test_a_worn_lexer_is_replaced_and_its_sequences_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies share the lexer's bound on states: what one has used up, another must not miss."""
    few = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=2000)
    monkeypatch.setattr(guidance, "LIMITS", few)
    monkeypatch.setattr(guidance, "_LEXER_SECONDS", 1e9)
    gone: list[bool] = []
    original = Constraint._go_alone
    monkeypatch.setattr(Constraint, "_go_alone", lambda self: gone.append(original(self)) or gone[-1])
    form, grammars = TextForm("regex", "[a-z]*x[a-z]{12}y"), Grammars(byte_vocabulary())
    texts = [bytes(random.Random(seed).choices(b"wx", k=700)) for seed in range(12)]
    for text in texts:
        constraint = grammars.compile(form)
        for byte in text:
            assert constraint.allowed()[byte]
            constraint.accept(byte)
    assert gone, "the test wears no lexer out"
    assert all(gone)


def test_vocabularies_that_are_not_kept_are_forgotten_and_told_again(workshop: Workshop) -> None:
    """Of members that come and go: each has a key of its own for ever, wherever it lies in memory."""
    kept, gone = Grammars(byte_vocabulary()), Grammars(byte_vocabulary())

    async def run() -> None:
        for grammars in (kept, gone):
            await workshop.prepare(grammars, one_of(["a"]))
        workshop.keep([kept])
        await workshop.prepare(kept, one_of(["b"]))
        assert workshop._trial._known == {kept.key}
        await workshop.prepare(gone, one_of(["b"]))

    asyncio.run(run())
    for grammars in (kept, gone):
        assert grammars.compile(one_of(["b"])).allowed().nonzero().flatten().tolist() == [ord("b")]
    assert len({Grammars(byte_vocabulary()).key for _ in range(3)} | {kept.key, gone.key}) == 5
    workshop.close()
    workshop.keep([])


@pytest.mark.parametrize(("at_once", "priority"), [(60.0, 0), (0.05, 19)])
def test_a_form_that_takes_long_leaves_the_cores_to_others(
    at_once: float, priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_AT_ONCE_SECONDS", at_once)
    reading, writing = os.pipe()

    def speak() -> None:
        os.write(writing, b"gram")
        time.sleep(0.3)
        os.write(writing, b"mar")
        os.close(writing)

    own = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        speaker = threading.Thread(target=speak)
        speaker.start()
        assert trial._all_of(reading, child.pid) == b"grammar"
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == max(priority, own)
        speaker.join()
        child.kill()
    os.close(reading)

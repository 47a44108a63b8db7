"""Plain text of a given length, the same for the same seed and different for another.

Sentences with ordinary words, so that members spell them as they spell real text; and `stories`, which people wrote.
Knows no models but through the tokenizer that it is given.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_WHO = (
    "The baker",
    "A young doctor",
    "My neighbour",
    "The old captain",
    "Our teacher",
    "The engineer",
    "A farmer",
)
_DID = ("bought", "repaired", "carried", "painted", "counted", "described", "borrowed", "watched", "measured")
_WHAT = ("a wooden boat", "seven apples", "the broken clock", "two heavy boxes", "a small garden", "some maps")
_WHEN = ("before the rain came", "on Monday morning", "in the middle of winter", "without a word", "near the sea")
_THINGS = ("apples", "tickets", "pencils", "bricks", "letters", "coins", "chairs", "bottles", "stamps", "shells")


def sentences(seed: int, num: int) -> str:
    """`num` sentences, a space between them."""
    draw = random.Random(seed)
    return " ".join(" ".join(map(draw.choice, (_WHO, _DID, _WHAT, _WHEN))) + "." for _ in range(num))


def token_ids(tokenizer: Any, seed: int, length: int) -> list[int]:
    """The first `length` tokens of such text, with what the tokenizer puts before a prompt."""
    ids = tokenizer.encode(sentences(seed, length))
    assert len(ids) >= length, "a sentence has more than one token"
    return list(ids[:length])


def stories(tokenizer: Any, data: Path, num: int, length: int) -> list[list[int]]:
    """The first `length` tokens of `num` texts: the problems of a development set, told one after the other.

    Text i begins with another problem than text i - 1. Raises SystemExit where the set is not there.
    """
    path = data / "gsm8k_dev.jsonl"
    if not path.exists():
        raise SystemExit(f"{path} is not there; --data names the folder of the development sets")
    told = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    problems = [f"{each['question']} {each['answer']}\n\n" for each in told]
    found = []
    for i in range(num):
        text, at = "", 3 * i
        while len(ids := tokenizer.encode(text)) < length:
            text += problems[at % len(problems)]
            at += 1
        found.append(list(ids[:length]))
    return found


def examples(tokenizer: Any, seed: int, length: int) -> str:
    """A few-shot prompt: at least `length` tokens of solved problems, which end with an empty line."""
    draw = random.Random(seed)
    shots = ""
    while len(tokenizer.encode(shots)) < length:
        shots += _problem(draw, solved=True)
    return shots


def question(seed: int) -> str:
    """A problem of the same kind that is not solved."""
    return _problem(random.Random(seed), solved=False)


def _problem(draw: random.Random, *, solved: bool) -> str:
    first, second = draw.randint(2, 40), draw.randint(2, 40)
    who, thing = draw.choice(_WHO), draw.choice(_THINGS)
    asked = f"Question: {who} had {first} {thing} and got {second} more. How many {thing} are there now?\nAnswer:"
    return (
        f"{asked} {first} + {second} = {first + second}. The answer is {first + second}.\n\n" if solved else asked
    )

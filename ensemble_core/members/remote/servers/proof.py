"""Whether a server is what the configuration takes it for: tokens, numbers, and how many of them.

Raises HostError with what to do. Knows dialects; does not know how a member is driven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ensemble_core.errors import HostError, MemberError
from ensemble_core.members.remote.servers.base import Dialect, Question, Row
from ensemble_core.members.remote.servers.connection import RefusedError
from ensemble_core.text.vocabulary import Vocabulary

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces,\n\na blank line\tand 12345.678 numbers;",
    "Ünïcödé: 北京 ラーメン العربية 🎈 naïve café",
    "def f(x):\n    return {x: [i ** 2 for i in range(10)]}\n",
)
_EXCESS = 1e-4  # of the candidates' mass over 1
_SAME = 1e-3  # nats; of the same answer at two temperatures, asked in one go each
_ALIKE = 0.25  # nats; of the likeliest tokens of an answer before and after a restart
_COMPARED = 5  # of an answer's likeliest tokens


def prove_tokens(name: str, dialect: Dialect, vocabulary: Vocabulary) -> None:
    """The server spells texts in the same tokens."""
    for text in _TEXTS:
        ours, theirs = list(vocabulary.encode(text)), dialect.tokenize(text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise HostError(
                f"member {name!r}: {dialect.title} has another tokenizer: {text!r} is {theirs[at : at + 4]} there "
                f"and {ours[at : at + 4]} here from token {at} on; `model` must be the one that it serves"
            )


def proven_length(name: str, dialect: Dialect, max_len: int) -> int:
    """The longest text that may be asked about: there must be room for the answer. Raises HostError."""
    there = dialect.served().max_len
    if there is not None and there < max_len:
        raise HostError(
            f"members.{name}.max_len: {max_len} tokens, where {dialect.title} takes {there}; lower it, or raise its "
            "limit"
        )
    return max_len if there is None else min(max_len, there - 1)


def prove_numbers(name: str, dialect: Dialect, vocabulary: Vocabulary, num: int) -> Row:
    """It tells as many candidates as are asked for, as plain log-probabilities; returns the answer to a probe."""
    question = [Question(tuple(vocabulary.encode(_TEXTS[0])))]
    try:
        (row,) = dialect.ask(question, num)
    except RefusedError as error:
        if error.status == 400 and "logprobs" in error.reason:
            raise HostError(
                f"member {name!r}: {dialect.title} does not tell {num} candidates, which is "
                f"scheduler.num_candidates: {error.reason}; {dialect.raise_limit.format(num=num)}"
            ) from error
        raise
    if len(row) < min(num, len(vocabulary)):
        raise HostError(
            f"member {name!r}: {dialect.title} tells {len(row)} candidates where {num} are asked for "
            f"(scheduler.num_candidates); {dialect.raise_limit.format(num=num)}"
        )
    if max(row) >= len(vocabulary) or min(row) < 0:
        raise HostError(f"member {name!r}: {dialect.title} tells ids up to {max(row)}, of {len(vocabulary)} here")
    mass = math.fsum(math.exp(min(logprob, 10.0)) for logprob in row.values())
    if mass > 1.0 + _EXCESS:
        raise HostError(
            f"member {name!r}: {dialect.title} tells numbers whose mass is {mass:.4g}, which are no "
            f"log-probabilities; {dialect.be_plain}"
        )
    (warmer,) = dialect.ask(question, num, dialect.other_temperature)
    if (apart := _apart(row, warmer, num)) > _SAME:
        raise HostError(
            f"member {name!r}: {dialect.title} tells other numbers at temperature "
            f"{dialect.other_temperature:g}, up to {apart:.2g} nats away: they are processed; {dialect.be_plain}"
        )
    return row


def is_same(before: Row, after: Row) -> bool:
    """Whether two answers to the probe are of one model, whatever the rounding."""
    return _apart(before, after, _COMPARED) <= _ALIKE


def ask_again(dialect: Dialect, vocabulary: Vocabulary, num: int) -> Row:
    """The answer to the probe. Raises MemberError."""
    (row,) = dialect.ask([Question(tuple(vocabulary.encode(_TEXTS[0])))], num)
    return row


def explained(name: str, error: MemberError) -> HostError:
    """An error of a request, as one of the start."""
    return HostError(f"{error}; is members.{name}.host.server right, and does the server run?")


def _apart(left: Mapping[int, float], right: Mapping[int, float], num: int) -> float:
    """Largest difference of the `num` likeliest of `left`; infinite where one is missing among the first few."""
    ranked = sorted(left, key=lambda token_id: -left[token_id])[:num]
    missing = any(token_id not in right for token_id in ranked[:_COMPARED])
    common = [abs(left[token_id] - right[token_id]) for token_id in ranked if token_id in right]
    return math.inf if missing or not common else max(common)

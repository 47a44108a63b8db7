"""Constrained decoding: which of main's tokens may come next, so that the text has the form that was asked for.

The grammar engine is llguidance. It gets our own vocabulary, so every kind of tokenizer works the same way.
Invariants: main's stop tokens are allowed exactly where the text is complete; a grammar that fails raises and never
lets text pass. Masks act on the fused distribution; assistants do not see them. Knows vocabularies; does not know
sequences or members.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.grammars import LIMITS, check_finite, grammar_of, tokenizer_of
from ensemble_core.errors import ConstraintError, InvalidRequestError
from ensemble_core.text.vocabulary import Vocabulary

ANY_OBJECT = TextForm("json")
_NUM_PROBED = 4  # tokens tried on a new constraint; many forms that cost too much fail right there
_NUM_KEPT = 64  # forms whose grammar or refusal is kept
_KEYS = itertools.count()
# Copies of a compiled grammar share a lexer, its states and their bound. One whose masks took this long may hold tens
# of thousands of states, so requests that come get a new one.
_LEXER_SECONDS = 0.5
_REPLAY_SECONDS = 0.1  # that one lexer's sequences may cost the engine to go on with lexers of their own
_CONTRADICTION = "no text can satisfy it"


@dataclass(slots=True)
class _Compiled:
    """A grammar over one vocabulary, at its beginning. seconds: of copies' masks. replays: seconds left for them."""

    matcher: LLMatcher
    grammar: str
    seconds: float = 0.0
    replays: float = _REPLAY_SECONDS

    @property
    def is_worn(self) -> bool:
        """Whether its lexer may hold many states."""
        return self.seconds > _LEXER_SECONDS or self.replays < _REPLAY_SECONDS


class Grammars:
    """Makes constraints over one vocabulary. Costly parts are built once, by `warm` or with the first constraint.

    What became of the last forms is kept: their compiled grammars, which requests share, or why they are refused.
    key: no other one of this process has it, now or later.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.key = next(_KEYS)
        self._vocabulary = vocabulary
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._kept: OrderedDict[TextForm, _Compiled | str] = OrderedDict()

    def compile(self, form: TextForm) -> Constraint:
        """A constraint for text of a form.

        Raises InvalidRequestError for a form that is invalid, that no text can have, and that costs too much.
        """
        if not self._vocabulary.stop_ids:
            raise InvalidRequestError(
                f"{form.field}: this model has no stop token, so constrained text could not end", form.field
            )
        found = self._find(form)
        if isinstance(found, str):
            reason = " ".join(found.split())[:300]
            raise InvalidRequestError(
                f"{form.field}: the {form.noun} cannot be used: {reason}; correct it", form.field
            )
        return Constraint(found, self._tokenizer, self._vocabulary, form).copy()

    def knows(self, form: TextForm) -> bool:
        """Whether `compile` has an answer at hand."""
        with self._lock:
            found = self._kept.get(form)
            return not self._vocabulary.stop_ids or (found is not None and not _is_worn(found))

    def learn(self, form: TextForm, grammar: str | None, refusal: str = "") -> None:
        """Keep what was found out of a form elsewhere: its grammar, or why it is refused."""
        self._keep(form, refusal if grammar is None else self._built(form, grammar))

    def warm(self) -> None:
        """Build the costly parts now: a second or two for a large vocabulary."""
        if self._vocabulary.stop_ids:
            self.compile(ANY_OBJECT)

    def outline(self) -> dict[str, Any]:
        """The size of the vocabulary, its control tokens and its stop tokens, ready for JSON."""
        ids = sorted(self._vocabulary.special_ids | self._vocabulary.stop_ids)
        specials = {str(i): name.decode("latin-1") for i in ids if (name := self._vocabulary.tokens[i])}
        return {"size": len(self._vocabulary), "specials": specials, "stops": sorted(self._vocabulary.stop_ids)}

    def _find(self, form: TextForm) -> _Compiled | str:
        with self._lock:
            found = self._kept.get(form)
            if found is not None and not _is_worn(found):
                self._kept.move_to_end(form)
                return found
        try:
            found = self._built(form, grammar_of(form))
            if isinstance(found, _Compiled):
                check_finite(form)
        except (ValueError, RecursionError) as error:
            found = str(error)
        return self._keep(form, found)

    def _keep(self, form: TextForm, found: _Compiled | str) -> _Compiled | str:
        with self._lock:
            self._kept[form] = found
            self._kept.move_to_end(form)
            while len(self._kept) > _NUM_KEPT:
                self._kept.popitem(last=False)
        return found

    def _built(self, form: TextForm, grammar: str) -> _Compiled | str:
        """A grammar over this vocabulary, its first tokens tried; or why it cannot be used."""
        with self._building:
            tokenizer, lengths = self._tokenizer, self._lengths
        made = _Compiled(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS), grammar)
        try:
            Constraint(made, tokenizer, self._vocabulary, form).probe(lengths)
        except ConstraintError as error:
            return error.reason
        made.seconds, made.replays = 0.0, _REPLAY_SECONDS
        return made

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        vocabulary = self._vocabulary
        # Every token must have a name, so ids without bytes get unique ones.
        names = [token or b"\xff<%d>" % i for i, token in enumerate(vocabulary.tokens)]
        return tokenizer_of(names, vocabulary.special_ids, vocabulary.stop_ids, vocabulary.encode)

    @cached_property
    def _lengths(self) -> Tensor:
        """(V,) length of every token in bytes."""
        return torch.tensor([len(token) for token in self._vocabulary.tokens])


def _is_worn(found: _Compiled | str) -> bool:
    return isinstance(found, _Compiled) and found.is_worn


class Constraint:
    """The position of one sequence in its grammar: a `Guide`. Once the grammar has failed, methods raise
    ConstraintError.

    Where the lexer that it shares has reached its bound, it goes on with a lexer of its own, as if it had been alone.
    """

    binds = chooses = True
    forced: int | None = None

    def __init__(self, origin: _Compiled, tokenizer: LLTokenizer, vocabulary: Vocabulary, form: TextForm) -> None:
        self._origin, self._tokenizer, self._vocabulary, self._form = origin, tokenizer, vocabulary, form
        self._matcher, self._taken, self._is_alone = origin.matcher, list[int](), False
        self._stop_ids = sorted(vocabulary.stop_ids)

    def allowed(self) -> Tensor:
        """(V,) bool on the CPU: the tokens that may come next, at least one."""
        bits = self._bits()
        if self._matcher.is_error() and self._go_alone():
            bits = self._bits()
        self._check()
        packed = np.frombuffer(bits, dtype=np.uint8)
        allowed = np.unpackbits(packed, count=len(self._vocabulary), bitorder="little").view(np.bool_)
        allowed[self._stop_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise self._error("no token of this model can go on with the text")
        return torch.from_numpy(allowed)

    def accept(self, token_id: int) -> None:
        """Advance by a token that `allowed` permitted."""
        if token_id not in self._vocabulary.stop_ids:
            self._matcher.consume_token(token_id)
            if self._matcher.is_error() and self._go_alone():
                self._matcher.consume_token(token_id)
            self._check()
            self._taken.append(token_id)

    def _bits(self) -> bytes:
        """A bit for each token, the first in the lowest bit of the first byte."""
        started = time.perf_counter()
        bits = self._matcher.compute_bitmask()
        self._origin.seconds += time.perf_counter() - started
        return bits

    def _go_alone(self) -> bool:
        """Compile the grammar anew and follow the text up to here. False: that would not help, or costs too much."""
        if self._is_alone or self._origin.replays <= 0 or "states" not in self._matcher.get_error():
            return False
        started = time.perf_counter()
        self._is_alone = True
        self._matcher = LLMatcher(self._tokenizer, self._origin.grammar, log_level=0, limits=LIMITS)
        self._matcher.consume_tokens(self._taken)
        self._origin.replays -= time.perf_counter() - started
        return True

    def copy(self) -> Constraint:
        """A copy at the same position."""
        twin = Constraint(self._origin, self._tokenizer, self._vocabulary, self._form)
        twin._matcher, twin._taken, twin._is_alone = self._matcher.deep_copy(), self._taken.copy(), self._is_alone
        return twin

    def probe(self, lengths: Tensor) -> None:
        """Try the first few tokens of a text, always the longest that is allowed. Does not advance.

        lengths: (V,) length of every token in bytes.
        """
        trial = self.copy()
        for _ in range(_NUM_PROBED):
            trial.accept(int((lengths * trial.allowed()).argmax()))

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
            raise self._error(_CONTRADICTION if reason == "NoExtensionBias" else reason)

    def _error(self, reason: str) -> ConstraintError:
        return ConstraintError(self._form.field, self._form.noun, reason)

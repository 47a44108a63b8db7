"""Constrained decoding: which of main's tokens may come next, so that the text has the form that was asked for.

The grammar engine is llguidance. It gets our own vocabulary, so every kind of tokenizer works the same way.
Invariants: main's stop tokens are allowed exactly where the text is complete; a grammar that fails raises and never
lets text pass. Masks act on the fused distribution; assistants do not see them. Knows vocabularies; does not know
sequences or members.
"""

from __future__ import annotations

import json
import threading
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.schemas import endless
from ensemble_core.errors import ConstraintError, InvalidRequestError
from ensemble_core.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT = TextForm("json")
_ANY_OBJECT = json.dumps({"type": "object"})
# Between the parts of a value: a space, or a new line with its indentation. With free white space a model might write
# nothing else until its tokens are used up. A schema's own `x-guidance` can override this.
_LAYOUT = r" |\n {0,16}"
# Limits of one schema. Measured: the first mask takes up to 0.2 s, in the caller's thread; a later one 10 ms, in the
# engine's; a state takes about 1 kB. Ordinary schemas, with hundreds of fields and formats, need at most half of
# this.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000, step_lexer_fuel=100_000, max_lexer_states=50_000, verbose_errors=False
)
_NUM_PROBED = 4  # tokens tried on a new constraint; many schemas that cost too much fail right there
_NUM_GROUPS = 4  # groups whose compiled grammar is kept for their next choice
_CONTRADICTION = "no text can satisfy it"


class _LLVocabulary:
    """A vocabulary in the form of a tokenizer that llguidance expects."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = min(vocabulary.stop_ids)
        self.bos_token_id = None
        # Every token must have a name, so ids without bytes get unique ones.
        self.tokens = [token or b"\xff<%d>" % i for i, token in enumerate(vocabulary.tokens)]
        self.special_token_ids = sorted(vocabulary.special_ids | vocabulary.stop_ids)
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Grammars:
    """Makes constraints over one vocabulary. Costly parts are built once, by `warm` or with the first constraint.

    The choices of a prompt share a compiled grammar and its limits, so 128 choices cost little more than one.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._of_group = lru_cache(_NUM_GROUPS)(lambda form, _group: self._compiled(form))

    def compile(self, form: TextForm, group: str | None = None) -> Constraint:
        """A constraint for text of a form. group: the request's group, if any.

        Raises InvalidRequestError for a form that is invalid, that no text can have, and that costs too much.
        """
        return self._compiled(form) if group is None else self._of_group(form, group).copy()

    def warm(self) -> None:
        """Build the costly parts now: a second or two for a large vocabulary."""
        if self._vocabulary.stop_ids:
            self._compiled(ANY_OBJECT)

    def _compiled(self, form: TextForm) -> Constraint:
        if not self._vocabulary.stop_ids:
            raise InvalidRequestError(
                f"{form.field}: this model has no stop token, so constrained text could not end", form.field
            )
        with self._lock:
            tokenizer, lengths = self._tokenizer, self._lengths
        try:
            matcher = LLMatcher(tokenizer, _grammar(form), log_level=0, limits=_LIMITS)
            constraint = Constraint(matcher, self._vocabulary, form)
            constraint.probe(lengths)
        except ConstraintError as error:
            raise _refusal(form, error.reason) from error
        except (ValueError, RecursionError) as error:
            raise _refusal(form, str(error)) from error
        if form.kind == "json" and form.source and (ref := endless(form.source)) is not None:
            raise _refusal(form, f"no finite value can satisfy it, since $ref {ref!r} always needs itself again")
        return constraint

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_LLVocabulary(self._vocabulary)), n_vocab=len(self._vocabulary))

    @cached_property
    def _lengths(self) -> Tensor:
        """(V,) length of every token in bytes."""
        return torch.tensor([len(token) for token in self._vocabulary.tokens])


class Constraint:
    """The position of one sequence in its grammar: a `Guide`.

    Once the grammar has failed, methods raise ConstraintError.
    """

    binds = chooses = True
    forced: int | None = None

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, form: TextForm) -> None:
        self._matcher, self._vocabulary, self._form = matcher, vocabulary, form
        self._stop_ids = sorted(vocabulary.stop_ids)

    def allowed(self) -> Tensor:
        """(V,) bool on the CPU: the tokens that may come next, at least one."""
        bits = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        self._check()
        allowed = torch.from_numpy(bits[: len(self._vocabulary)] > 0)
        allowed[self._stop_ids] = self._matcher.is_accepting()
        if not allowed.any():
            raise self._error("no token of this model can go on with the text")
        return allowed

    def accept(self, token_id: int) -> None:
        """Advance by a token that `allowed` permitted."""
        if token_id not in self._vocabulary.stop_ids:
            self._matcher.consume_token(token_id)
            self._check()

    def copy(self) -> Constraint:
        """A copy at the same position."""
        return Constraint(self._matcher.deep_copy(), self._vocabulary, self._form)

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


def _grammar(form: TextForm) -> str:
    """A form in llguidance's own terms. Raises ValueError where its text cannot be read."""
    match form.kind:
        case "json":
            layout = _LAYOUT if form.layout is None else form.layout
            spaces: JsonCompileOptions = (
                {"whitespace_pattern": layout} if layout else {"whitespace_flexible": False}
            )
            return LLMatcher.grammar_from_json_schema(form.source or _ANY_OBJECT, defaults=spaces)
        case "regex":
            return LLMatcher.grammar_from_regex(form.source)
        case "choice":  # one lexeme: choices as rules of their own would each be an item of the parser
            return LLMatcher.grammar_from_lark(
                "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, form.choices))
            )
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(form.source))


def _lark(source: str) -> str:
    """A grammar in Lark's form; one without a rule `start` is read as GBNF. Raises ValueError."""
    try:
        return any_to_lark(source)
    except Exception as error:  # its errors have no class of their own
        raise ValueError(
            f"it has no rule `start:`, as Lark has, and as GBNF it cannot be read: {error}"
        ) from error


def _refusal(form: TextForm, reason: str) -> InvalidRequestError:
    reason = " ".join(reason.split())[:300]
    return InvalidRequestError(f"{form.field}: the {form.noun} cannot be used: {reason}; correct it", form.field)

"""Constrained decoding: which of main's tokens may come next, so that the text is JSON of a schema.

The grammar engine is llguidance, fed with our own vocabulary, so that every kind of tokenizer works alike. Main's
stop tokens are allowed where the text is complete, and only then. Masks act on the fused distribution; assistants
know nothing of them. Knows vocabularies; does not know sequences or members.
"""

from __future__ import annotations

import json
import threading
from functools import cached_property

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from ensemble_core.errors import InvalidRequestError
from ensemble_core.text.vocabulary import Vocabulary

ANY_OBJECT = json.dumps({"type": "object"})
# Between the parts of a value: a space, or a new line with its indentation. Free white space would let a model that
# likes it write nothing else until its tokens are used up. A schema's own `x-guidance` may say otherwise.
_LAYOUT = r" |\n {0,16}"


class _Spelling:
    """A vocabulary in the form that llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = min(vocabulary.stop_ids)
        self.bos_token_id = None
        # Ids without bytes are named apart, since every token must have a name.
        self.tokens = [token or b"\xff<%d>" % i for i, token in enumerate(vocabulary.tokens)]
        self.special_token_ids = sorted(vocabulary.special_ids | vocabulary.stop_ids)
        self._encode = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Grammars:
    """Makes constraints over one vocabulary; what is costly is made once, at the first constraint."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()

    def compile(self, schema: str) -> Constraint:
        """A constraint for JSON text of a schema; "" is any object. Raises InvalidRequestError for a bad one."""
        if not self._vocabulary.stop_ids:
            raise InvalidRequestError(
                "response_format: this model has no stop token, so constrained text could not end",
                "response_format",
            )
        with self._lock:
            tokenizer = self._tokenizer
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema or ANY_OBJECT, defaults={"whitespace_pattern": _LAYOUT}
            )
        except ValueError as error:
            raise _refusal(str(error)) from error
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return Constraint(matcher, len(self._vocabulary), self._vocabulary.stop_ids)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Spelling(self._vocabulary)), n_vocab=len(self._vocabulary))


class Constraint:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, num_tokens: int, stop_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens
        self._stop_ids = sorted(stop_ids)

    def allowed(self) -> Tensor:
        """(V,) bool on the CPU: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_logit_bias(), dtype=np.uint8)
        allowed = torch.from_numpy(bits[: self._num_tokens] > 0)
        if self._matcher.is_accepting() or self._matcher.is_stopped():
            allowed[self._stop_ids] = True
        return allowed

    def accept(self, token_id: int) -> None:
        """Move on over a token that `allowed` let through."""
        if token_id not in self._stop_ids:
            self._matcher.consume_token(token_id)


def _refusal(reason: str) -> InvalidRequestError:
    reason = " ".join(reason.split())[:300]
    return InvalidRequestError(
        f"response_format: the JSON schema cannot be used: {reason}; correct the schema", "response_format"
    )

"""Forms and vocabularies in llguidance's own terms, and how much one form may cost. No torch.

Imported by the server's process and by the one that tries forms out. Does not know constraints or sequences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from ensemble_core.decoding.forms import TextForm
from ensemble_core.decoding.schemas import endless

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_ANY_OBJECT = json.dumps({"type": "object"})
_JSON_RULE = re.compile(r"%json\s*(?=\{)")
# Between the parts of a value: a space, or a new line with its indentation. With free white space a model might write
# nothing else until its tokens are used up. A schema's own `x-guidance` can override this.
_LAYOUT = r" |\n {0,16}"
# Limits of one form. Measured: the first mask takes up to 0.2 s, outside of the engine's thread; a later one 10 to
# 30 ms, in it; a state takes about 1 kB. Ordinary schemas, with hundreds of fields and formats, need at most half of
# this. An ambiguous grammar costs more with each token, until a step has too many items.
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=5_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


def grammar_of(form: TextForm) -> str:
    """A form as llguidance reads it. Raises ValueError where its text cannot be read."""
    match form.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(form.source or _ANY_OBJECT, defaults=spaces_of(form))
        case "regex":
            return LLMatcher.grammar_from_regex(form.source)
        case "choice":  # one lexeme: choices as rules of their own would each be an item of the parser
            return LLMatcher.grammar_from_lark(
                "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, form.choices))
            )
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(form.source))


def spaces_of(form: TextForm) -> JsonCompileOptions:
    """The white space between the parts of a form's JSON."""
    layout = _LAYOUT if form.layout is None else form.layout
    return {"whitespace_pattern": layout} if layout else {"whitespace_flexible": False}


def check_finite(form: TextForm) -> None:
    """Raise ValueError where no finite text has a form that the grammar engine has accepted.

    In a grammar this concerns its JSON schemas, each by itself; the message begins with the line, as the engine's do.
    """
    if form.kind == "json" and form.source:
        _check_schema(form.source)
    for line, schema in _schemas_in(form.source) if form.kind == "grammar" else ():
        _check_schema(schema, f"at {line}(1): ")


def _check_schema(schema: str, where: str = "") -> None:
    if (ref := endless(schema)) is not None:
        raise ValueError(f"{where}no finite value can satisfy it, since $ref {ref!r} always needs itself again")


def _schemas_in(grammar: str) -> Iterator[tuple[int, str]]:
    """The JSON schemas of a Lark grammar, with their lines."""
    decoder, end = json.JSONDecoder(), 0
    while (found := _JSON_RULE.search(grammar, end)) is not None:
        try:
            _, end = decoder.raw_decode(grammar, found.end())
        except ValueError:  # not a schema: the text of something else
            end = found.end()
            continue
        yield grammar.count("\n", 0, found.end()) + 1, grammar[found.end() : end]


def _lark(source: str) -> str:
    """A grammar in Lark's form; one without a rule `start` is read as GBNF. Raises ValueError."""
    try:
        return any_to_lark(source)
    except Exception as error:  # its errors have no class of their own
        raise ValueError(
            f"it has no rule `start:`, as Lark has, and as GBNF it cannot be read: {error}"
        ) from error


class _NamedTokens:
    """A vocabulary in the form of a tokenizer that llguidance expects."""

    bos_token_id = None

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Collection[int], eos: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, sorted(special_ids), eos
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def tokenizer_of(
    tokens: Sequence[bytes],
    special_ids: Collection[int],
    stop_ids: Collection[int],
    encode: Callable[[str], list[int]],
) -> LLTokenizer:
    """A vocabulary as llguidance reads it. Control tokens can be named in grammars."""
    words = _NamedTokens(tokens, set(special_ids) | set(stop_ids), min(stop_ids), encode)
    return LLTokenizer(TokenizerWrapper(words), n_vocab=len(tokens))

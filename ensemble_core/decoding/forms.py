"""What the text of a request must be: JSON of a schema, a match of a pattern, one of some strings, or of a grammar.

No torch: requests carry it, `guidance` makes constraints of it. Invariant: a form is bounded (its source, the number
of its choices); whether it can be followed is found out when it is compiled. Does not know vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ensemble_core.errors import InvalidRequestError, quoted

FormKind = Literal["json", "regex", "choice", "grammar"]
MAX_FORM_LENGTH = 65_536  # characters of a source
MAX_CHOICES = 1024
_NOUNS: dict[FormKind, str] = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "grammar": "grammar",
}


@dataclass(frozen=True, slots=True)
class TextForm:
    """What a text must be, from its first to its last character.

    source: of "json" a schema as JSON text, or "" for any object; of "regex" a regular expression (Rust's syntax, no
    look-around, no back references) that the whole text matches; of "choice" a JSON list of strings; of "grammar" a
    grammar in Lark's form with llguidance's additions, or in GBNF. A Lark grammar may mix free text, `%json {...}`
    and control tokens: `<[5]>` by main's id, or `<|name|>` by name. A token that ends texts has no effect there: it
    is allowed where the text is complete, and nowhere else. layout: of "json", the regular expression of white space
    between the parts of a value; "": none; None: a space, or a new line with its indentation. field: what the client
    calls this form, for messages; two forms that differ in it alone are equal. most: characters of its source.
    """

    kind: FormKind
    source: str = ""
    layout: str | None = None
    most: int = field(default=MAX_FORM_LENGTH, compare=False, kw_only=True)
    field: str = field(default="form", compare=False)

    def __post_init__(self) -> None:
        kinds = get_args(FormKind)
        if self.kind not in kinds:
            raise self._wrong(f"kind must be one of {', '.join(kinds)}, got {quoted(self.kind)}")
        for text in (self.source, self.layout or ""):
            if len(text) > self.most:
                raise self._wrong(f"takes up to {self.most} characters, got {len(text)}")
        if self.kind in ("regex", "grammar") and not self.source:
            raise self._wrong(f"must not be empty; send a {self.noun}, or leave it out")
        if self.kind == "choice":
            self._check_choices()

    @property
    def noun(self) -> str:
        """The kind in words."""
        return _NOUNS[self.kind]

    @property
    def choices(self) -> tuple[str, ...]:
        """The strings of a form of kind "choice"."""
        return tuple(json.loads(self.source))

    def _check_choices(self) -> None:
        try:
            choices = json.loads(self.source)
        except (ValueError, RecursionError):
            choices = None
        if not isinstance(choices, list) or not all(isinstance(each, str) and each for each in choices):
            raise self._wrong("must be a list of strings that are not empty")
        if not 1 <= len(choices) <= MAX_CHOICES:
            raise self._wrong(f"takes 1 to {MAX_CHOICES} strings, got {len(choices)}")

    def _wrong(self, reason: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self.field}: {reason}", self.field)


def one_of(choices: Sequence[str], field: str = "form") -> TextForm:
    """The form of a text that is one of some strings. Raises InvalidRequestError."""
    if len(choices) > MAX_CHOICES:
        raise InvalidRequestError(f"{field}: takes 1 to {MAX_CHOICES} strings, got {len(choices)}", field)
    return TextForm("choice", json.dumps(list(choices)), field=field)

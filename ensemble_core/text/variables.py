"""What a client may tell chat templates: values for their variables, and how much the model should reason.

Invariants: variables are data, bounded before a template sees them; they never steer the rendering itself. What no
template reads changes nothing. Knows the text of templates; does not run them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MAX_VARIABLES = 64
MAX_VARIABLES_TEXT = 65_536  # characters of all of them as JSON
MAX_VARIABLES_DEPTH = 16
MAX_NUMBER = 2**53
_EFFORT, _SWITCH = "reasoning_effort", "enable_thinking"
_OFF = ("none", "minimal")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# What the rendering itself is told, by us or by transformers, and what templates find in their environment.
_CONTROL = frozenset(
    {"add_generation_prompt", "chat", "chat_template", "continue_final_message", "conversation", "conversations"}
    | {"documents", "loop", "max_length", "messages", "padding", "raise_exception", "return_assistant_tokens_mask"}
    | {"return_dict", "return_tensors", "sanitize_control_tokens", "self", "strftime_now", "tokenize"}
    | {"tokenizer_kwargs", "tools", "truncation"}
)


def check_variables(values: object) -> dict[str, Any]:
    """Values for variables of templates. Raises ValueError that names the one at fault."""
    if not isinstance(values, dict):
        raise ValueError('must be an object of variable -> value, for example {"enable_thinking": false}')
    if len(values) > MAX_VARIABLES:
        raise ValueError(f"takes up to {MAX_VARIABLES} variables, got {len(values)}")
    for name in values:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError("names of variables are 1 to 64 letters, digits and _, with a letter first")
        if name in _CONTROL or name.endswith(("_token", "_tokens")):
            raise ValueError(f"{name} steers the rendering itself, which a request cannot; leave it out")
    _check_values(values)
    return values


def _check_values(values: Mapping[str, Any]) -> None:
    level: list[object] = [values]
    for _ in range(MAX_VARIABLES_DEPTH):
        if any(isinstance(each, int | float) and not _is_modest(each) for each in level):
            raise ValueError(f"numbers are finite, up to {MAX_NUMBER}")
        level = [child for each in level for child in _children(each)]
    if level:
        raise ValueError(f"values are nested up to {MAX_VARIABLES_DEPTH} levels deep")
    if len(written := json.dumps(values, ensure_ascii=False)) > MAX_VARIABLES_TEXT:
        raise ValueError(f"takes up to {MAX_VARIABLES_TEXT} characters of JSON, got {len(written)}")
    if re.search("[\ud800-\udfff]", written):
        raise ValueError("must be valid Unicode, without lone surrogates")


def _is_modest(number: float) -> bool:
    return abs(number) <= MAX_NUMBER  # false for NaN, too


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


@dataclass(frozen=True, slots=True)
class TemplateVariables:
    """What a request tells templates. values: as `check_variables` lets them pass; they go before the effort."""

    values: Mapping[str, Any] = field(default_factory=dict)
    effort: Effort | None = None

    def of(self, template: str) -> dict[str, Any]:
        """The variables for one template: all values, and the effort in the variables that it reads."""
        known = {} if self.effort is None else {_EFFORT: self.effort, _SWITCH: self.effort not in _OFF}
        return {name: value for name, value in known.items() if reads(template, name)} | dict(self.values)

    @property
    def needs_reader(self) -> bool:
        """Whether the effort is lost where no template reads it: that no model reasons is so anyway."""
        return self.effort not in (None, "none")


def reads_effort(template: str) -> bool:
    """Whether a template has a variable that the effort sets."""
    return reads(template, _EFFORT) or reads(template, _SWITCH)


def reads(template: str, name: str) -> bool:
    """Whether a template has this name."""
    return re.search(rf"\b{name}\b", template) is not None

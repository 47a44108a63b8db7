"""What requests and answers look like on the wire.

Invariants: JSON types are strict (a string is no number, a bool no integer; an integer is a fine float); null
means the default; a parameter that would change the answer and is not supported is refused by name unless its
value is neutral; other unknown fields are ignored. Ranges are checked by `SamplingParams`, in the same words
for the offline API; here they only document.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ensemble_core.decoding.sampling_params import MAX_STOPS
from ensemble_core.errors import InvalidRequestError

logger = logging.getLogger(__name__)

# Parameters that would change the answer and are not supported, with the values that change nothing. null is
# neutral for all of them. `best_of` is neutral where it equals `n`.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "top_k": (0, -1),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _same(value: object, neutral: object) -> bool:
    """Equal as JSON: False is not 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def refuse_unsupported(body: dict[str, Any]) -> None:
    """Raise InvalidRequestError for the first parameter whose value would change the answer."""
    for name in body.keys() & NEUTRAL.keys():
        neutral = NEUTRAL[name] if name != "best_of" else (body.get("n") or 1,)
        if body[name] is None or any(_same(body[name], value) for value in neutral):
            continue
        allowed = " or ".join([*(json.dumps(value) for value in neutral), "null"])
        raise InvalidRequestError(f"{name} is not supported yet; leave it out or send {allowed}", name)


def _decoded(body: object) -> object:
    """A body whose content type is not JSON arrives as bytes; clients that send one mean JSON all the same."""
    if not isinstance(body, bytes):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _text(value: object) -> str:
    """A string that UTF-8 can spell: JSON can write half a surrogate pair, no tokenizer can read it."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    if _LONE_SURROGATE.search(value):
        raise ValueError("must be valid Unicode, without lone surrogates")
    return value


def _texts(value: object) -> str | list[str]:
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, str):
        return _text(value)
    raise ValueError("must be a string or a list of strings")


def _prompt(value: object) -> str | list[str]:
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError("token ids are not supported yet; send a string or a list of strings")
    if not value or (isinstance(value, list) and "" in value):
        raise ValueError("must be a string or a list of strings, none of them empty")
    return _texts(value)


def _stop(value: object) -> str | list[str] | None:
    if isinstance(value, list) and len(value) > MAX_STOPS:
        raise ValueError(f"takes up to {MAX_STOPS} strings, got {len(value)}")
    return None if value is None else _texts(value)


def _fusion(value: object) -> object:
    """`"relative"` is short for `{"name": "relative"}`."""
    return {"name": value} if isinstance(value, str) else value


Text: TypeAlias = Annotated[str, BeforeValidator(_text)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, protected_namespaces=())


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(
        None, description="One more chunk before [DONE], without choices, that carries the usage."
    )
    continuous_usage_stats: bool | None = Field(None, description="Usage so far in each chunk.")


class FusionChoice(_Strict):
    """A registered fusion and its options."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    options: dict[str, Any] | None = None


class EnsembleOptions(_Strict):
    """Our extension: what this request changes of its ensemble. Sent through the SDK's `extra_body`."""

    members: list[Text] | None = Field(
        None, min_length=1, max_length=64, description="The members to use, the main one among them."
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, allow_inf_nan=False)]] | None = Field(
        None, min_length=1, max_length=64, description="Member -> weight; scaled to sum to 1."
    )
    fusion: Annotated[
        FusionChoice | None, BeforeValidator(_fusion, json_schema_input_type=str | FusionChoice | None)
    ] = Field(None, description="Name of a fusion, or {name, options}.")
    mode: Literal["lockstep"] | None = Field(None, description="How steps are taken.")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        known = sorted(cls.model_fields)
        for key in value.keys() - cls.model_fields.keys():
            if key == "trace" and (value[key] is None or value[key] is False):
                continue
            problem = "is not supported yet" if key == "trace" else "is unknown"
            path = f"ensemble.{key}"
            raise InvalidRequestError(f"{path} {problem}; ensemble takes {', '.join(known)}", path)
        return value


class CompletionRequest(_Strict):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "duo", "prompt": "The capital of France is", "max_tokens": 32}}
    )

    model: Text = Field(description="An ensemble or a member; GET /v1/models lists them.")
    prompt: Annotated[str | list[str], BeforeValidator(_prompt)] = Field(
        description="One text or several; none of them empty."
    )
    max_tokens: int | None = Field(
        None, description="Most tokens of each choice, 16 if not sent.", json_schema_extra={"minimum": 1}
    )
    temperature: float | None = Field(
        None,
        description="1 if not sent; 0 takes the likeliest token.",
        json_schema_extra={"minimum": 0, "maximum": 2},
    )
    top_p: float | None = Field(
        None,
        description="Keep the likeliest tokens that together hold this mass; 1 (all) if not sent.",
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
    )
    n: int | None = Field(
        None, description="Choices for each prompt, 1 if not sent.", json_schema_extra={"minimum": 1}
    )
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop)] = Field(
        None, description=f"Up to {MAX_STOPS} texts that end a choice; they are not part of it."
    )
    seed: int | None = Field(
        None, description="Makes sampling reproducible. Choice i of each prompt draws with seed + i."
    )
    stream: bool | None = Field(None, description="Send server-sent events as text comes.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Accepted; changes nothing.")
    ensemble: EnsembleOptions | None = Field(None, description="What to change of the ensemble; see there.")

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: object) -> object:
        body = _decoded(value)
        if isinstance(body, dict):
            refuse_unsupported(body)
            if ignored := body.keys() - cls.model_fields.keys() - NEUTRAL.keys():
                logger.debug("ignored unknown fields: %s", sorted(ignored))
        return body

    @property
    def prompts(self) -> list[str]:
        """The prompts, one or several, as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Usage(BaseModel):
    """Counts of the main member's tokens; each prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """One choice, or a piece of it. index = prompt index * n + i."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None


class Completion(BaseModel):
    """An answer, or one chunk of a stream. `usage` is left out of chunks unless it was asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One servable model. `recipe` is an ensemble's: members with weights, main, fusion, mode."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unisono"
    kind: Literal["ensemble", "member"]
    max_model_len: int
    recipe: dict[str, Any] | None


class ModelList(BaseModel):
    """All servable models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every refusal."""

    error: ErrorDetail

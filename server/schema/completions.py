"""Bodies and answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from ensemble_core.decoding.parameters import MAX_INT
from server.schema.json_values import Integer, Prompts
from server.schema.replies import PromptToken, Reply, Sent, TraceStep
from server.schema.sampling import SamplingFields, parameter
from server.schema.unsupported import COMPLETION_IGNORED, COMPLETION_REFUSED, Ignored, Refused


class CompletionRequest(SamplingFields):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"model": "duo", "prompt": "The capital of France is", "max_tokens": 32}}
    )
    refused: ClassVar[Mapping[str, Refused]] = COMPLETION_REFUSED
    ignored: ClassVar[Mapping[str, Ignored]] = COMPLETION_IGNORED

    prompt: Prompts = Field(
        description="a text, token ids of the main member, or a list of either; none may be empty",
        examples=[[[1, 2], [3]]],
    )
    max_tokens: Integer | None = parameter(
        "max_tokens", "maximum number of tokens of each choice; 0 only with `echo`", minimum=0
    )
    best_of: Integer | None = Field(
        None,
        description="sample this many, send the n with the highest mean log-probability, best first; `usage` counts "
        "all; at least n, and with `stream` not more than n",
        examples=[2],
        json_schema_extra={"minimum": 1},
    )
    echo: bool | None = parameter("echo")
    logprobs: Integer | None = parameter("logprobs")
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1, le=MAX_INT)] | None = Field(
        None,
        description="of a longer prompt only the last so many of main's tokens are used; -1: as many as the context "
        "holds beside `max_tokens`",
        examples=[10],
    )
    add_special_tokens: bool | None = Field(
        None,
        description="true if not sent; tokenizers add their own tokens in front of a text prompt",
        examples=[False],
    )

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """The prompts, one or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        if ids:
            return [tuple(ids)]
        return [tuple(item) if isinstance(item, list) else str(item) for item in self.prompt]


class Logprobs(BaseModel):
    """Parallel lists, one entry for each token. With echo the prompt comes first; its first token has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Sent):
    """One choice, or a piece of it. index = prompt index * n + i."""

    always: ClassVar[tuple[str, ...]] = ("prompt_token_ids", "token_ids")

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[int, PromptToken] | None] | None = Field(
        None, description="With prompt_logprobs: a map of ids for each token, null for the first."
    )
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    token_ids: list[int] | None = Field(None, description="With return_token_ids.")
    trace: list[TraceStep] | None = Field(None, description="With ensemble.trace: one entry for each token.")
    council: dict[str, Any] | None = Field(
        None, description="With ensemble.trace: a council's votes, scores, rounds."
    )


class TextCompletion(Reply):
    """An answer, or one chunk of a stream. Chunks have `usage` only if the client asked for it."""

    object: Literal["text_completion"]
    choices: list[TextChoice]

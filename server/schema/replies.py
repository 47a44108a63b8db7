"""What the answers of all endpoints are made of: usage, traces, models, tokenizers, errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field


class PromptTokensDetails(BaseModel):
    """What the prompt's tokens cost."""

    cached_tokens: int = Field(description="Taken over from the main member's cache of earlier prompts.")


class Usage(BaseModel):
    """Counts of the main member's tokens; each prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dropped_members: dict[str, str] | None = Field(
        None, description="Member -> why some choice went on without it; not sent where none was lost."
    )


class Reply(BaseModel):
    """What completions, chat completions and their chunks have in common."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[BaseModel]
    usage: Usage | None = None


class TracedToken(BaseModel):
    """One token that a member, or all of them fused, could have gone on with."""

    token: str
    prob: float


class TraceStep(BaseModel):
    """How one token came about."""

    token: str
    consulted: bool = Field(description="False where the main member decided alone.")
    members: dict[str, list[TracedToken]] = Field(description="Member -> its likeliest tokens, best first.")
    fused: list[TracedToken]
    agreed: dict[str, bool] = Field(description="Assistant -> whether its likeliest token spells the same.")
    weights: dict[str, float] = Field(description="Of the members that were consulted; they sum to 1.")
    left_out: dict[str, str] = Field(description="Member that failed -> why it was not asked.")


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

"""Bodies and answers of the admin's routes: members and recipes that come and go."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.schema.replies import ModelCard


class AdminBody(BaseModel):
    """Unknown keys are refused: a change is not to be taken for another."""

    model_config = ConfigDict(extra="forbid")


class LoadBody(AdminBody):
    """What to load, where the configuration does not declare it."""

    member: dict[str, Any] | None = Field(
        None, description="A member's section as in the YAML; leave it out for a member that is declared."
    )


class LeaveBody(AdminBody):
    """How a member leaves."""

    drain_seconds: float | None = Field(
        None,
        ge=0.0,
        le=86_400.0,
        allow_inf_nan=False,
        description="That requests which use the member have to end; null: `server.drain_seconds`.",
    )
    force: bool = Field(
        False,
        description="Those that are left then are treated as where the member fails: with `on_member_failure: drop` "
        "they go on without it. false: they end with an error.",
    )


class SleepBody(LeaveBody):
    """How a member goes to sleep."""

    level: Literal[1] = Field(1, description="1: the cache is given back, weights are kept. To drop them, unload.")


class RecipeBody(AdminBody):
    """A recipe and its name."""

    name: str
    recipe: dict[str, Any] = Field(description="The section of `ensembles` as in the YAML, of any kind.")


class MemberCard(BaseModel):
    """One declared member."""

    name: str
    object: Literal["member"] = "member"
    state: str = Field(description="ready, draining, unloaded, asleep, loading or waking.")
    since: float = Field(description="Unix time at which it came to stand so.")
    failure: str | None = Field(description="Why its last load or wake came to nothing.")
    model: str = Field(description="The checkpoint, as configured.")
    device: str | None
    memory_bytes: dict[str, int] = Field(description="Device -> bytes of weights and cache.")
    num_requests: int = Field(description="Choices that use it now.")
    models: list[str] = Field(description="Models that need it.")


class MemberCards(BaseModel):
    """All declared members, and the process."""

    object: Literal["list"] = "list"
    data: list[MemberCard]
    rss_bytes: int = Field(description="What the server's process holds of the machine's memory.")
    change: str | None = Field(description="The change that is under way.")


class RecipeCard(BaseModel):
    """A recipe that was added or replaced."""

    model: ModelCard
    replaced: bool


class Deleted(BaseModel):
    """A recipe that is no more."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True

"""What the routes of one app share, and how a route gets at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request

from ensemble_core.config import ServerConfig
from server.edge.metrics import PrometheusSink
from server.schema.answer import ErrorBody

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Edge:
    """The engine's runtime and what surrounds it."""

    runtime: Runtime
    config: ServerConfig
    metrics: PrometheusSink
    created: int  # Unix time of the app's start


async def _edge(request: Request) -> Edge:
    return cast(Edge, request.app.state.edge)


EdgeOf = Annotated[Edge, Depends(_edge)]
REFUSALS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any refusal, in OpenAI's shape."}
}

"""The objects that the routes of one app share, and the dependency that gives them to a route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request

from ensemble_core.server_config import ServerConfig
from server.batches.desk import BatchDesk
from server.edge.live import LiveConfig
from server.edge.metrics import PrometheusMetrics
from server.schema.replies import ErrorBody

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Services:
    """The engine's runtime, the configuration and the metrics."""

    runtime: Runtime
    live: LiveConfig
    metrics: PrometheusMetrics
    created: int  # Unix time of the app's start
    keyed: bool  # a client needs a key
    batches: BatchDesk | None = None  # with server.files_folder

    @property
    def config(self) -> ServerConfig:
        """The server's section as it stands now."""
        return self.live.config


async def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesOf = Annotated[Services, Depends(_services)]
REFUSALS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "Any refusal, in OpenAI's shape."}
}

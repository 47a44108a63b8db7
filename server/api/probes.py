"""The endpoints that report the server's state: health, readiness, version, metrics."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from ensemble_core.errors import NotReadyError
from server.api.services import REFUSALS, ServicesOf

router = APIRouter(responses=REFUSALS)


@router.get("/health")
async def health(services: ServicesOf) -> dict[str, str]:
    """200 while the engine's loop is alive, including while it loads or drains."""
    status = services.runtime.status()
    if status.state == "dead":
        raise NotReadyError(f"the engine is dead: {status.reason}")
    return {"status": status.state}


@router.get("/ready")
async def ready(services: ServicesOf) -> dict[str, str]:
    """200 from the end of loading until draining begins."""
    status = services.runtime.status()
    if status.state != "ready":
        raise NotReadyError(f"not ready, {status.state}: {status.reason}")
    return {"status": status.state}


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The version of this server."""
    return {"version": version("unisono")}


@router.get("/metrics", response_class=Response)
async def get_metrics(request: Request, services: ServicesOf) -> Response:
    """All metrics in Prometheus' text format, or in OpenMetrics where the Accept header asks for it."""
    runtime = services.runtime
    state = runtime.status().state
    services.metrics.state(runtime.models(), state in ("ready", "draining"), state == "ready")
    accept = ",".join(request.headers.getlist("accept"))
    text, content_type = services.metrics.render(accept)
    return Response(text, headers={"Content-Type": content_type, "Vary": "Accept"})

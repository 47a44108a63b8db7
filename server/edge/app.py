"""The HTTP app: a factory without globals. It only knows how the parts fit together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from ensemble_core.server_config import ServerConfig
from server.api import admin, files, probes, routes, tokenizers
from server.api.services import Services
from server.batches.calls import InnerClient
from server.batches.desk import BatchDesk, Caller
from server.edge import docs, errors
from server.edge.access import log_access
from server.edge.auth import Gate, KeyRing, load_admin_keys, load_keys
from server.edge.bodies import BodyLimit
from server.edge.door import Door
from server.edge.exchange import Exchange
from server.edge.live import LiveConfig
from server.edge.metrics import PrometheusMetrics
from server.edge.middleware import Lenient, RequestContext, RootPath
from server.edge.openapi import require_key
from server.edge.traces import Traces, open_traces
from server.playground.page import page_paths, playground_router

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime

# FastAPI's own spans and logs quote paths and wrong bodies; ours do not. Versions without them ignore this.
_SIGNALS = ("tracing", "metrics", "logs", "operation_spans", "auto_configure")
_WITHOUT_TELEMETRY: dict[str, Any] = {"telemetry": dict.fromkeys(_SIGNALS, False)}


def create_app(
    runtime: Runtime, config: ServerConfig, metrics: PrometheusMetrics, stored: Sequence[Mapping[str, Any]] = ()
) -> FastAPI:
    """An app that serves `runtime`. Its lifespan starts the runtime, and drains and stops it at shutdown.

    stored: the requests whose stored answers the runtime replays, for the playground to offer.

    Raises ConfigError if the API keys cannot be loaded, and if traces cannot be sent.
    """
    keys, admin_keys = load_keys(config), load_admin_keys(config)
    traces = open_traces() if config.traces else None
    live = LiveConfig(config)
    desk = _desk(runtime, live, lambda owner: InnerClient(app, owner))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        runtime.start()
        try:
            async with nullcontext() if desk is None else desk.open():
                yield
            await runtime.drain(live.config.drain_seconds)
        finally:
            await asyncio.to_thread(runtime.stop)
            if traces is not None:
                await asyncio.to_thread(traces.close)

    app = FastAPI(
        title="Unisono",
        summary="Several language models answer as one.",
        version=version("unisono"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **_WITHOUT_TELEMETRY,
    )
    app.state.services = Services(runtime, live, metrics, int(time.time()), bool(keys), desk)
    ours = [*_routers(desk), *([admin.router] if admin_keys else [])]
    if config.playground:
        ours.append(playground_router(stored))
    for router in (routes.router, tokenizers.router, probes.router, docs.router, *ours):
        app.include_router(router)
    _add_middleware(app, live, (keys, admin_keys), metrics, _observers(config, metrics, traces))
    errors.install(app, metrics)
    return app


def _desk(runtime: Runtime, live: LiveConfig, caller: Caller) -> BatchDesk | None:
    """Who works on batches, if the server keeps files. Raises ConfigError for their folder."""
    folder = live.config.files_folder
    return None if folder is None else BatchDesk(folder, live, runtime, caller)


def _routers(desk: BatchDesk | None) -> tuple[APIRouter, ...]:
    return () if desk is None else (files.files, files.batches)


def _observers(
    config: ServerConfig, metrics: PrometheusMetrics, traces: Traces | None
) -> list[Callable[[Exchange], None]]:
    """What learns of each exchange when it has ended."""

    def count(exchange: Exchange) -> None:
        taken = exchange.generation
        metrics.answered(exchange.route, exchange.status, None if taken is None else taken.model)

    observers: list[Callable[[Exchange], None]] = [count]
    if config.access_log:
        observers.append(log_access)
    return observers if traces is None else [*observers, traces.record]


def _add_middleware(
    app: FastAPI,
    live: LiveConfig,
    rings: tuple[KeyRing, KeyRing],
    metrics: PrometheusMetrics,
    observers: Sequence[Callable[[Exchange], None]],
) -> None:
    """Add the innermost first. CORS is outside the gate: a preflight has no key, and web pages can read a 401.

    rings: the clients' keys, and the admin's.
    """
    (keys, admin_keys), config = rings, live.config
    uploads = frozenset[str]() if config.files_folder is None else frozenset({files.UPLOAD_PATH})
    app.add_middleware(BodyLimit, live=live, uploads=uploads)
    if keys or admin_keys:
        app.add_middleware(
            Gate,
            keys=keys,
            protect_metrics=config.protect_metrics,
            metrics=metrics,
            admin_keys=admin_keys,
            pages=page_paths() if config.playground else frozenset(),
        )
        require_key(app, clients=bool(keys))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Door, live=live, keyed=bool(keys), metrics=metrics)
    app.add_middleware(Lenient)
    app.add_middleware(RequestContext, observers=observers)
    if config.root_path:
        app.add_middleware(RootPath, root_path=config.root_path)

"""The HTTP app: a factory without globals. It knows how the parts are put together and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI

from ensemble_core.config import ServerConfig
from server import errors
from server.metrics import PrometheusSink
from server.middleware import BodyLimit, RequestContext
from server.routes import Edge, router

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime


def create_app(runtime: Runtime, config: ServerConfig, metrics: PrometheusSink) -> FastAPI:
    """An app that serves `runtime`: its lifespan starts the runtime, and drains and stops it at shutdown."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None]:
        runtime.start()
        try:
            yield
            await runtime.drain(config.drain_seconds)
        finally:
            await asyncio.to_thread(runtime.stop)

    app = FastAPI(
        title="Unisono",
        summary="Several language models answer as one.",
        version=version("unisono"),
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.edge = Edge(runtime, config, metrics, created=int(time.time()))
    app.include_router(router)
    # The one added last is the outermost.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(RequestContext)
    errors.install(app, metrics)
    return app

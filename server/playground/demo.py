"""`unisono playground --demo`: the whole app over stored answers, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ensemble_core.server_config import ServerConfig
from server.edge.app import create_app
from server.edge.metrics import PrometheusMetrics
from server.edge.serving import serve
from server.playground.stored import StoredRuntime

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime


def serve_demo(config: ServerConfig, announce: Callable[[str], None]) -> None:
    """Serve until a signal arrives. Raises ConfigError if the address cannot be used."""
    metrics = PrometheusMetrics()
    stored = StoredRuntime(metrics.record)
    runtime = cast("Runtime", stored)  # all of it that the app needs without members
    app = create_app(runtime, config, metrics, stored.requests)
    serve(app, runtime, config, announce)

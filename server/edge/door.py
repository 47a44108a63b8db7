"""What every request must be before anything reads it: whole headers, one kind of framing, a host that is meant.

A web page that a browser has open on this machine must not be able to use a server without keys. So such a server,
while it listens on loopback, answers only to localhost and to IP addresses (a page's own name may be made to resolve
to 127.0.0.1), and takes bodies only with a JSON content type (see `bodies.py`). Pure ASGI. Does not know routes.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_core.server_config import ServerConfig
from server.edge.errors import ApiError
from server.edge.live import LiveConfig
from server.edge.metrics import PrometheusMetrics

_CLOSE = {"Connection": "close"}


class Door:
    """Refuses requests by their headers alone."""

    def __init__(self, app: ASGIApp, live: LiveConfig, keyed: bool, metrics: PrometheusMetrics) -> None:
        self._app = app
        self._live = live
        self._hosts = allowed_hosts(live.config, keyed)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        self._metrics.rejected("invalid_request")
        await refusal.response(str(scope["path"]))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        most = self._live.config.limits.header_bytes
        if num_bytes > most:
            message = f"the request line and headers are over {most} bytes (server.limits.header_bytes)"
            return ApiError(431, message, headers=_CLOSE)
        if "transfer-encoding" in headers and "content-length" in headers:
            return ApiError(400, "Content-Length and Transfer-Encoding contradict each other", headers=_CLOSE)
        if self._hosts is not None and not _is_meant(headers.get("host", ""), self._hosts):
            message = "this Host is not served; use localhost or an address, or set server.allowed_hosts"
            return ApiError(421, message)
        return None


def allowed_hosts(config: ServerConfig, keyed: bool) -> frozenset[str] | None:
    """The names that may be addressed, beside IP addresses; None: any."""
    if config.allowed_hosts is not None:
        return None if "*" in config.allowed_hosts else frozenset(map(str.lower, config.allowed_hosts))
    return frozenset({"localhost"}) if _is_loopback(config.host) and not keyed else None


def _is_meant(host: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header, with or without a port, names one of `hosts` or an IP address."""
    name = host.lower()
    if not name.endswith("]"):
        name = name.rpartition(":")[0] or name
    return not name or name in hosts or _address(name) is not None


def _is_loopback(host: str) -> bool:
    found = _address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None

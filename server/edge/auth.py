"""API keys, and the gate that checks them.

Invariants: if any key is set, every route except the open ones needs a key, even routes that do not exist; a key of
clients never opens the admin's routes, nor the other way round. Keys are
compared as hashes, all of them, in constant time. A key is never logged, quoted or shown by a repr. A named source
without a key is an error, so that a typo does not open the server.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping

from pydantic import SecretStr
from starlette.types import ASGIApp, Receive, Scope, Send

from ensemble_core.errors import ConfigError
from ensemble_core.server_config import ServerConfig
from server.edge.errors import ApiError
from server.edge.metrics import PrometheusMetrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
ADMIN_PATH = "/v1/admin"
ADMIN = "unisono.admin"  # in the scope: the key was one of the admin's
# In the scope: whose key it was, so that places are shared among clients. Calls from inside the process come with it.
CLIENT = "unisono.client"
BATCH = "unisono.batch"  # in the scope of a batch's requests: nobody waits for their answers
_METRICS = "/metrics"
_KEY = re.compile(r"[\x21-\x7e]+")


class KeyRing:
    """The hashes of the valid keys. If empty, no key is needed."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        self._digests = frozenset(_digest(key.get_secret_value().encode()) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, key: bytes) -> bool:
        """True for one of the keys. Takes the same time for every key of the same length."""
        presented = _digest(key)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, presented)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def load_keys(config: ServerConfig) -> KeyRing:
    """The clients' keys of all sources.

    Raises ConfigError for a source that cannot be read or has no keys, and for a key that does not fit in a header.
    """
    sources = {"server.api_keys": list(config.api_keys)}
    if config.api_key_env is not None:
        sources["server.api_key_env"] = list(_from_environment(config.api_key_env))
    if config.api_key_file is not None:
        sources["server.api_key_file"] = list(_from_file(config))
    return _ring(sources)


def load_admin_keys(config: ServerConfig) -> KeyRing:
    """The keys that open the admin's routes, and nothing else.

    Raises ConfigError as `load_keys`, and for a key that clients have, too.
    """
    sources = {"server.admin_keys": list(config.admin_keys)}
    if config.admin_key_env is not None:
        sources["server.admin_key_env"] = list(_from_environment(config.admin_key_env))
    ring, clients = _ring(sources), load_keys(config)
    for source, keys in sources.items():
        if any(clients.admits(key.get_secret_value().encode()) for key in keys):
            raise ConfigError(f"{source}: a key of the clients is among them; give the admin a key of its own")
    return ring


def _ring(sources: Mapping[str, list[SecretStr]]) -> KeyRing:
    for source, keys in sources.items():
        if not all(_KEY.fullmatch(key.get_secret_value()) for key in keys):
            raise ConfigError(f"{source}: a key must be visible ASCII characters without spaces, at least one")
        if not keys and not source.endswith("_keys"):
            raise ConfigError(f"{source}: gives no key; set one there or drop the field")
    return KeyRing(key for keys in sources.values() for key in keys)


def _from_environment(variable: str) -> Iterator[SecretStr]:
    for key in os.environ.get(variable, "").split(","):
        if key.strip():
            yield SecretStr(key.strip())


def _from_file(config: ServerConfig) -> Iterator[SecretStr]:
    assert config.api_key_file is not None
    try:
        lines = config.api_key_file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"server.api_key_file: {config.api_key_file} cannot be read ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.api_key_file: {config.api_key_file} is not UTF-8 text") from error
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            yield SecretStr(line)


class Gate:
    """Answers 401 to requests without a valid key. Pure ASGI, around all routes.

    The admin's routes open to the admin's keys alone, if there are any; those keys open nothing else.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        protect_metrics: bool,
        metrics: PrometheusMetrics,
        admin_keys: KeyRing | None = None,
        pages: frozenset[str] = frozenset(),
    ) -> None:
        """pages: paths of pages without secrets, which need no key."""
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._open = OPEN_PATHS | pages if protect_metrics else OPEN_PATHS | pages | {_METRICS}
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = route_path(scope) if scope["type"] == "http" else ""
        is_admin = bool(self._admin_keys) and (path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/"))
        keys = self._admin_keys if is_admin else self._keys
        inner = CLIENT in scope and not is_admin
        if scope["type"] != "http" or inner or path in self._open or not keys:
            await self._app(scope, receive, send)
            return
        key = _bearer(scope)
        if key is not None and keys.admits(key):
            scope.update({ADMIN: True} if is_admin else {CLIENT: _digest(key).hex()})
            await self._app(scope, receive, send)
            return
        refusal = _refusal(missing=key is None)
        self._metrics.rejected("unauthorized")
        logger.info("refused: status=%d code=%s", refusal.status, refusal.code)
        await refusal.response(route_path(scope))(scope, receive, send)


def route_path(scope: Scope) -> str:
    """The path as the router sees it: without the root path, if it begins with it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if path == root or path.startswith(root + "/") else path


def _bearer(scope: Scope) -> bytes | None:
    """The key in the Authorization header, else in X-Api-Key; None for none, several headers or another scheme."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if not values:
        keys = [value.strip() for name, value in scope["headers"] if name == b"x-api-key"]
        return keys[0] if len(keys) == 1 else None
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _refusal(missing: bool) -> ApiError:
    problem = "no API key was sent" if missing else "this API key is not known"
    return ApiError(
        401,
        f"{problem}; send one as `Authorization: Bearer KEY`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )

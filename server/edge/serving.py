"""The serving process: socket, HTTP server, signals. It does not know routes.

After a signal the server first drains while it still listens, so that /ready and new requests get a 503 and running
streams can finish. Then it closes. A second signal ends the wait: open streams get their error event, and the process
ends. If loading fails, the server stops and the caller gets the error.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from ensemble_core.config import Config
from ensemble_core.errors import ChangeConflictError, ConfigError, UnisonoError
from ensemble_core.server_config import ServerConfig
from server.edge.auth import load_keys
from server.edge.connection import Connection
from server.edge.live import LiveConfig
from server.edge.logs import set_level

if TYPE_CHECKING:
    from ensemble_core.runtime import Runtime

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_FLUSH_SECONDS = 5  # after the drain, to send the last bytes of answers
_LAST_WORDS_SECONDS = 1.0  # after a second signal, to send the error events


class DrainingServer(uvicorn.Server):
    """uvicorn's server, with a drain before its shutdown and a message once the engine is ready."""

    def __init__(
        self,
        config: uvicorn.Config,
        runtime: Runtime,
        live: LiveConfig,
        announce: Callable[[], None],
        read: Callable[[], Config] | None = None,
    ) -> None:
        """read: the configuration as it stands in its file now, for SIGHUP; None: there is no file."""
        super().__init__(config)
        self._runtime = runtime
        self._live = live
        self._announce = announce
        self._read = read
        self._reloads = asyncio.Event()  # a SIGHUP has come
        self.failure: Exception | None = None  # the error that loading raised

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and to SIGHUP, too."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reloads.set)
        await super().startup(sockets)

    async def main_loop(self) -> None:
        """Wait for the engine, then serve until a signal arrives."""
        while self._runtime.status().state == "loading" and not self.should_exit:
            await self.on_tick(0)
            await asyncio.sleep(_POLL_SECONDS)
        if not self.should_exit:
            self._check_loaded()
        reloading = asyncio.create_task(self._reload_on_demand())
        try:
            await super().main_loop()
        finally:
            reloading.cancel()

    async def _reload_on_demand(self) -> None:
        """Each SIGHUP is one reload; those that come during one are the next."""
        while True:
            await self._reloads.wait()
            self._reloads.clear()
            try:
                await reload(self._runtime, self._live, self._read)
            except UnisonoError as error:
                logger.error("SIGHUP: nothing is changed: %s", " ".join(str(error).split()))
            except Exception:
                logger.exception("SIGHUP: nothing is changed")

    def _check_loaded(self) -> None:
        try:
            self._runtime.wait_ready()
        except Exception as error:
            self.failure = error
            self.should_exit = True
        else:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, a second one of either kind ends it."""
        self._captured_signals.append(sig)
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests finish, then close."""
        drain = asyncio.create_task(self._runtime.drain(self._live.config.drain_seconds))
        while not drain.done() and not self.force_exit:
            await asyncio.wait([drain], timeout=_POLL_SECONDS)
        drain.cancel()
        if self.force_exit:
            await self._last_words()
        await super().shutdown(sockets)

    async def _last_words(self) -> None:
        """End all requests, so that their streams end with an error event."""
        self._runtime.abort_all()
        deadline = asyncio.get_running_loop().time() + _LAST_WORDS_SECONDS
        while self.server_state.tasks and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS / 10)


async def reload(runtime: Runtime, live: LiveConfig, read: Callable[[], Config] | None) -> None:
    """Serve what the configuration's file says now, or change nothing. Raises a UnisonoError that says why."""
    if read is None:
        raise ConfigError("this server was not started from a file")
    while True:
        try:
            await runtime.changes.reload(read)
            break
        except ChangeConflictError as error:
            logger.info("SIGHUP: waits: %s", error)
            await asyncio.sleep(1.0)
    live.config = runtime.loaded().config.server
    set_level(live.config.log_level)


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises ConfigError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"server.host, server.port: cannot listen on {config.host}:{config.port} ({error.strerror}); "
            "choose another with --host or --port"
        ) from error
    # asyncio sets this itself only on sockets that name their protocol. Without it an answer may wait 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def check_tls(config: ServerConfig) -> str | None:
    """Check the TLS files and return the private key's password, if any. Raises ConfigError."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    password = _tls_password(config.tls_key_password_env)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        for file in (config.tls_cert_file, config.tls_key_file):
            file.open("rb").close()  # ssl does not say which file it is
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, lambda: password or "")
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.tls_cert_file, server.tls_key_file: {config.tls_cert_file} and {config.tls_key_file} cannot "
            f"be used ({error.reason or error.strerror or 'not PEM'}); give a PEM certificate and its own private "
            "key, and tls_key_password_env if the key is encrypted"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"server.tls_cert_file, server.tls_key_file: {error.filename} cannot be read ({error.strerror})"
        ) from error
    return password


def _tls_password(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"server.tls_key_password_env: the environment variable {variable} is not set")
    return os.environ[variable]


def url(host: str, port: int, scheme: str = "http") -> str:
    """The server's address for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl_line(base: str, model: str, keyed: bool = False) -> str:
    """A command to try the server. keyed: it reads the API key from the environment."""
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 32, "temperature": 0}
    key = ' -H "Authorization: Bearer $UNISONO_API_KEY"' if keyed else ""
    return f"curl {base}/v1/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def serve(
    app: FastAPI,
    runtime: Runtime,
    config: ServerConfig,
    say: Callable[[str], None],
    read: Callable[[], Config] | None = None,
) -> None:
    """Serve until a signal arrives; return after a graceful shutdown.

    say: shows a line to the user who started the server. read: the configuration as its file is now. Raises
    ConfigError for the address and the TLS files, and any error of loading.
    """
    settings = settings_of(app, config)
    listener = listen(config)
    base = url(config.host, listener.getsockname()[1], "https" if settings.is_ssl else "http")

    def announce() -> None:
        gc.collect()
        gc.freeze()  # what is loaded stays; looking through it again and again would stop all threads for 0.25 s each
        say(f"ready at {base}; try:")
        say(curl_line(base, runtime.models()[0].name, keyed=bool(load_keys(config))))
        if config.playground:
            say(f"the playground is at {base}/")

    server = DrainingServer(settings, runtime, app.state.services.live, announce, read)
    say(f"listening on {base}; loading")
    _run(server, listener)
    if server.failure is not None:
        raise server.failure
    # A step that hangs cannot be stopped, and neither can Python's end while a member's thread runs.
    if not runtime.stop(_LAST_WORDS_SECONDS if server.force_exit else 0.0):
        logger.warning("ending the process during a step of the engine")
        logging.shutdown()
        os._exit(0)


def settings_of(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's settings. Raises ConfigError for TLS files that cannot be used."""
    password = check_tls(config)
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        timeout_keep_alive=math.ceil(config.limits.keep_alive_seconds),
        http=partial(Connection, app.state.services.live),  # type: ignore[arg-type]
        ssl_certfile=config.tls_cert_file,
        ssl_keyfile=config.tls_key_file,
        ssl_keyfile_password=password,
    )


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run the server. uvicorn raises its signal again after shutdown; ignore it, since this is a normal end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a SIGHUP before the loop runs has nothing to reload
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

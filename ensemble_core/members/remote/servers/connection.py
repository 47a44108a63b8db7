"""HTTP to one server, with its errors as errors of a member.

A request changes nothing over there, so it is sent again where the connection failed, twice at most; nothing else is
tried again. The key is read from the environment and never told. Knows httpx; does not know what is asked.
"""

from __future__ import annotations

import os
import ssl
import time
from typing import Any

import httpx

from ensemble_core.errors import HostError, MemberError, MemberLostError, MemberTimeoutError
from ensemble_core.hosts import ServerHost

_RETRIES = (0.05, 0.2)  # seconds before each
_LONGEST = 300  # characters of a server's message that are told


class RefusedError(MemberError):
    """The server answered with a status that is not 200."""

    def __init__(self, member: str, status: int, message: str) -> None:
        super().__init__(member, f"its server answered {status}: {message}")
        self.status, self.reason = status, message


class ServerConnection:
    """Kept open between requests. Raises HostError where the configuration cannot be used."""

    def __init__(self, member: str, host: ServerHost) -> None:
        self._member, self._host = member, host
        verify = True if host.ca_file is None else ssl.create_default_context(cafile=str(host.ca_file))
        headers = {"authorization": f"Bearer {key}"} if (key := _key(member, host)) else {}
        self._client = httpx.Client(
            base_url=host.url.rstrip("/"), headers=headers, timeout=host.timeout, verify=verify, trust_env=False
        )

    def get(self, path: str) -> Any:
        """The JSON of an address. Raises MemberError."""
        return self._send("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of an answer. Raises MemberError."""
        return self._send("POST", path, body)

    def close(self) -> None:
        """Close it."""
        self._client.close()

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        for pause in (*_RETRIES, None):
            try:
                return self._opened(self._client.request(method, path, json=body))
            except httpx.TimeoutException as error:
                raise MemberTimeoutError(
                    self._member, f"its server took longer than host.server.timeout, {self._host.timeout:g} s"
                ) from error
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if pause is None or isinstance(error, httpx.InvalidURL):
                    raise MemberLostError(
                        self._member,
                        f"its server {self._host.url} cannot be reached: {error or type(error).__name__}",
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last try neither returned nor raised")

    def _opened(self, response: httpx.Response) -> Any:
        if response.status_code in (401, 403):
            where = self._host.api_key_env
            advice = (
                f"correct the key in {where}" if where else "name the variable that holds its key: api_key_env"
            )
            raise RefusedError(self._member, response.status_code, f"it does not accept the key; {advice}")
        if response.status_code in (502, 503, 504):
            raise MemberLostError(self._member, f"its server answered {response.status_code}: {_text(response)}")
        if response.status_code != 200:
            raise RefusedError(self._member, response.status_code, _text(response))
        try:
            return response.json()
        except ValueError as error:
            raise MemberError(self._member, f"its server's answer is not JSON: {_text(response)!r}") from error


def _key(member: str, host: ServerHost) -> str | None:
    if host.api_key_env is None:
        return None
    if key := os.environ.get(host.api_key_env):
        return key
    raise HostError(f"members.{member}.host.server.api_key_env: {host.api_key_env} is not set; export it")


def _text(response: httpx.Response) -> str:
    """A server's own message, short."""
    try:
        told = response.json()
        error = told.get("error", told.get("message", told)) if isinstance(told, dict) else told
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        text = response.text
    return " ".join(text.split())[:_LONGEST]

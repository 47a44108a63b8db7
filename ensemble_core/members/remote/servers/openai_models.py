"""The list of models in OpenAI's form, as vLLM and SGLang give it, with the length that they add."""

from __future__ import annotations

from typing import Any

from ensemble_core.errors import HostError
from ensemble_core.hosts import ServerHost
from ensemble_core.members.remote.servers.base import Served
from ensemble_core.members.remote.servers.connection import ServerConnection


def listed(connection: ServerConnection, host: ServerHost) -> Served:
    """The model that `host` means. Raises MemberError, HostError."""
    models: list[dict[str, Any]] = connection.get("/v1/models")["data"]
    names = [str(model["id"]) for model in models]
    if host.served is None and len(names) == 1:
        chosen = models[0]
    elif host.served in names:
        chosen = models[names.index(host.served)]
    else:
        raise HostError(f"host.server.served: {host.served!r} is not served by {host.url}, which has {names}")
    length = chosen.get("max_model_len")
    return Served(str(chosen["id"]), None if length is None else int(length))

"""What vLLM and SGLang have in common: models listed as OpenAI lists them, with a length, and `/tokenize`."""

from __future__ import annotations

from typing import Any

from ensemble_core.errors import HostError
from ensemble_core.hosts import ServerHost
from ensemble_core.members.remote.servers.base import Served
from ensemble_core.members.remote.servers.connection import ServerConnection


class ListedModel:
    """The half of a `base.Dialect` that says which model is meant, and spells texts."""

    def __init__(self, connection: ServerConnection, host: ServerHost, vocabulary: int) -> None:
        self._connection, self._host = connection, host
        self._name = host.served or ""

    def served(self) -> Served:
        """See `Dialect.served`. Raises HostError where it is not there."""
        host = self._host
        models: list[dict[str, Any]] = self._connection.get("/v1/models")["data"]
        names = [str(model["id"]) for model in models]
        wanted = names[0] if host.served is None and len(names) == 1 else host.served
        if wanted not in names:
            raise HostError(f"host.server.served: {wanted!r} is not served by {host.url}, which has {names}")
        self._name, length = wanted, models[names.index(wanted)].get("max_model_len")
        return Served(wanted, None if length is None else int(length))

    def tokenize(self, text: str) -> list[int]:
        """See `Dialect.tokenize`."""
        body = {"model": self._name, "prompt": text, "add_special_tokens": False}
        return [int(token_id) for token_id in self._connection.post("/tokenize", body)["tokens"]]

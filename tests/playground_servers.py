"""Servers for the playground's tests: an engine over members of bytes, and scripts of any text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fake_runtime
import pytest
from fake_runtime import FakeModel, FakeRuntime, live_server
from fakes import FakeMember, byte_vocabulary, fake_config, fake_loaded

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.factory import Loaded
from ensemble_core.runtime import Runtime
from ensemble_core.server_config import ServerConfig
from ensemble_core.stats import Record
from server.edge.metrics import PrometheusMetrics

NAMES = ("alpha", "beta", "gamma")
_TRIO: dict[str, Any] = {
    "members": {"alpha": 0.5, "beta": 0.3, "gamma": 0.2},
    "main": "alpha",
    "fusion": {"name": "projection"},
}
ENSEMBLES: dict[str, Any] = {
    "trio": _TRIO,
    "ahead": _TRIO | {"mode": "verify"},
    "poll": {"kind": "vote", "models": {"trio": 2, "beta": 1}, "answer": "exact", "temperature": 1.0},
}


@contextmanager
def engine_server(**fields: Any) -> Iterator[str]:
    """A real engine over three members with one tokenizer. fields: of the server's section."""
    members = {name: FakeMember(name, byte_vocabulary(), seed=seed) for seed, name in enumerate(NAMES)}
    metrics = PrometheusMetrics()

    def load(config: Config, record: Record) -> Loaded:
        return fake_loaded(config, members, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "load", load)
        runtime = Runtime(fake_config(NAMES, ensembles=ENSEMBLES), metrics.record)
        with live_server(runtime, ServerConfig.model_validate(fields), metrics) as url:
            runtime.wait_ready()
            yield url


@contextmanager
def scripted_server(*pieces: str, **fields: Any) -> Iterator[str]:
    """A server that writes these tokens, whatever is asked. fields: of the runtime."""
    with pytest.MonkeyPatch.context() as patch:
        roomy = [FakeModel(each.name, each.kind, 10_000, each.recipe) for each in fake_runtime.MODELS]
        patch.setattr(fake_runtime, "MODELS", roomy)
        with live_server(FakeRuntime(script=pieces, **fields)) as url:
            yield url

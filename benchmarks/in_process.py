"""A runtime in this process, for benchmarks of the engine without HTTP. Does not know what is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ensemble_core.config import Config
from ensemble_core.runtime import Runtime

T = TypeVar("T")


def in_process(config: Config, act: Callable[[Runtime], Coroutine[Any, Any, T]]) -> T:
    """Load a configuration, act on its runtime once it is ready, and stop it."""
    runtime = Runtime(config)
    runtime.start()
    runtime.wait_ready()
    try:
        return asyncio.run(act(runtime))
    finally:
        runtime.stop()

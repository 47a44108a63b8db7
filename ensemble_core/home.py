"""The folder for everything that can be fetched or computed again: models, compiled loops, cached answers."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$UNISONO_HOME`, else `unisono` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if own := os.environ.get("UNISONO_HOME"):
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "unisono"

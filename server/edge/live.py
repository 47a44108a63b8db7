"""The server's section as it stands now. A reload replaces it, and whoever reads it here sees that at once."""

from __future__ import annotations

from dataclasses import dataclass

from ensemble_core.server_config import ServerConfig


@dataclass(slots=True)
class LiveConfig:
    """What holds now; read it anew for each decision."""

    config: ServerConfig

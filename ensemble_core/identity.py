"""What a member's answers depend on, as text: for artefacts that are learnt from them. No torch.

Where a member runs, how much memory it has and in which folder its checkpoint lies do not count. Does not know what
is learnt.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ensemble_core.member_config import MemberConfig


def checkpoint(model: str, configuration: str = "config.json") -> list[str]:
    """A hub id as it is; of a folder the name, and the digest of its configuration: folders move."""
    folder = Path(model)
    if not folder.is_absolute():
        return [model]
    about = folder / configuration
    return [folder.name, hashlib.sha256(about.read_bytes()).hexdigest() if about.exists() else ""]


def weights_of(member: MemberConfig) -> list[Any]:
    """The checkpoint and the adapter of a member, each with its revision."""
    identity = [checkpoint(member.model), member.revision]
    if member.adapter is None:
        return identity
    return [*identity, checkpoint(member.adapter, "adapter_config.json"), member.adapter_revision]


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

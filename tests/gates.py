"""Gates with random numbers, and as files that fit a configuration of fake members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fakes import FakeMember, fake_config, space_of

from ensemble_core.config import Config
from ensemble_core.fusion.base import FusionSpace
from ensemble_core.fusion.evidence import NAMES
from ensemble_core.fusion.gate import GateNumbers, WeightGate
from ensemble_core.fusion.gate_store import GateOrigin, save_gate


def numbers_of(num: int, seed: int = 0, hidden: int = 6, scale: float = 1.0) -> GateNumbers:
    """Of `num` members; scale 0: weights stay as they are."""
    draw = torch.Generator().manual_seed(seed)
    width = len(NAMES)
    return GateNumbers(
        mean=torch.randn(num, width, generator=draw),
        spread=torch.rand(num, width, generator=draw) + 0.5,
        inner=torch.randn(num, width, hidden, generator=draw) / 3,
        shift=torch.randn(num, hidden, generator=draw),
        outer=scale * torch.randn(num, hidden, generator=draw),
        bias=scale * torch.randn(num, generator=draw),
    )


def gate_of(space: FusionSpace, seed: int = 0, scale: float = 1.0) -> WeightGate:
    """A random gate, the same for each member whatever the order: its name chooses its numbers."""
    parts = [numbers_of(1, seed + 100 * ord(name[0]), scale=scale) for name in space.members]
    names = GateNumbers.__dataclass_fields__
    return WeightGate.over(space, GateNumbers(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names}))


def gated_config(
    members: Mapping[str, FakeMember],
    path: Path,
    ensemble: Mapping[str, Any],
    numbers: GateNumbers,
    **sections: Any,
) -> Config:
    """A configuration whose `duo` has a gate, which is written to `path`."""
    duo = dict(ensemble) | {"weighting": {"by": "gate", "artefact": str(path)}}
    config = fake_config(list(members), ensembles={"duo": duo}, **sections)
    save_gate(path, numbers, GateOrigin.of(config, "duo", space_in(config, members)), {"task": "0"}, {})
    return config


def space_in(config: Config, members: Mapping[str, FakeMember]) -> FusionSpace:
    """Of the members of `duo`, main first."""
    return space_of(in_order(config, members))


def in_order(config: Config, members: Mapping[str, FakeMember]) -> Sequence[FakeMember]:
    """The members of `duo`, main first."""
    return [members[name] for name in config.ensembles["duo"].weights]

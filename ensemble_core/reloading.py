"""What a changed configuration file asks of a running server: what differs, and what would need a restart.

Does not know how a change is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from ensemble_core.config import Config
from ensemble_core.decoding.capacity import Limits
from ensemble_core.errors import ConfigError
from ensemble_core.section import Section

# What can be changed while requests run; members and recipes come beside it.
_LIVE = {
    "scheduler": {
        "max_running", "max_waiting", "max_queued_tokens", "token_budget", "max_stretch", "spare", "prefix_reuse",
        "priority", "stall_seconds",
    },
    "server": {"max_body_bytes", "max_choices", "drain_seconds", "allow_overrides", "limits", "log_level"},
    "server.limits": {
        "connections", "header_bytes", "header_seconds", "body_seconds", "body_memory", "body_values", "messages",
        "write_seconds", "stream_buffer", "request_seconds",
        "batch_lines", "batch_share", "file_seconds",
    },
    "matrices": set(),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """Names of what a configuration has otherwise than another; members that are gone, new or declared anew.

    An adapter is declared anew where its base is, whose weights it shares.
    """

    gone: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    recipes: tuple[str, ...]
    fields: tuple[str, ...]

    @classmethod
    def of(cls, before: Config, after: Config) -> Difference:
        """What `after` has otherwise."""
        both = [name for name in after.members if name in before.members]
        old, new = ({**config.ensembles, **config.councils} for config in (before, after))
        changed = {name for name in both if before.members[name] != after.members[name]}
        return cls(
            gone=tuple(name for name in before.members if name not in after.members),
            new=tuple(name for name in after.members if name not in before.members),
            changed=tuple(name for name in both if changed.intersection((name, after.owner(name)))),
            recipes=tuple(name for name in {**old, **new} if old.get(name) != new.get(name)),
            fields=tuple(_differing(before, after)),
        )

    def __str__(self) -> str:
        parts = {
            "members gone": self.gone,
            "members new": self.new,
            "members declared anew": self.changed,
            "recipes": self.recipes,
            "fields": self.fields,
        }
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names) or "nothing"


def require_no_restart(before: Config, after: Config) -> None:
    """Raise ConfigError that names the fields which only a restart can change."""
    fixed = [path for path in _differing(before, after) if not _is_live(path)]
    if before.deterministic != after.deterministic:
        fixed.append("deterministic")
    if not fixed and before.member_timeout != after.member_timeout:
        fixed.append("scheduler.member_timeout (unset, it follows from whether a member has a host)")
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)}: cannot be changed without a restart; restart, or set the file back as it was"
        )


def engine_limits(config: Config) -> Limits:
    """The engine's limits."""
    scheduler = config.scheduler
    return Limits(
        scheduler.max_running,
        scheduler.max_waiting,
        scheduler.token_budget,
        scheduler.max_stretch,
        scheduler.max_queued_tokens,
        scheduler.spare,
    )


def _differing(before: Config, after: Config) -> list[str]:
    """Paths of fields that differ, in the sections that are neither members nor recipes."""
    found = []
    for path in ("matrices", "scheduler", "server"):
        found += _paths(path, getattr(before, path), getattr(after, path))
    return found


def _paths(path: str, before: Section, after: Section) -> list[str]:
    found = []
    for name in type(after).model_fields:
        one, other, own = getattr(before, name), getattr(after, name), f"{path}.{name}"
        if one == other:
            continue
        found += _paths(own, one, other) if own in _LIVE else [own]
    return found


def _is_live(path: str) -> bool:
    section, _, name = path.rpartition(".")
    return name in _LIVE[section]

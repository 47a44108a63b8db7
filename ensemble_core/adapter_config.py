"""Members that are adapters in the YAML file: what they have from their base, and what they may have of their own.

A member with `adapter` and `base` runs the base's weights, so whatever is not said of it is as the base has it, and
what belongs to the weights cannot be said otherwise. Floor 0: no torch. Does not know what an adapter's files hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

NOT_HANDED_ON = ("adapter", "adapter_revision", "base", "host")
OF_ITS_BASE = (
    "model",
    "revision",
    "dtype",
    "device",
    "device_map",
    "max_memory",
    "forward",
    "trust_remote_code",
)  # of the weights, which are the base's


def with_bases(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members as they stand in the file, adapters filled up with what their bases say.

    Raises ValueError, with the field's path, for a base that is not there or is no base.
    """
    found = {name: _said(member) for name, member in members.items()}
    for name, said in found.items():
        if isinstance(said, dict) and said.get("adapter") and not said.get("base"):
            raise ValueError(f"members.{name}.adapter: needs `base`, the member whose weights it adapts; set both")
    return {name: _filled(name, found) if _names_a_base(found[name]) else members[name] for name in members}


def check_adapters(members: Mapping[str, BaseModel]) -> None:
    """Raise ValueError, with the field's path, where an adapter differs from its base in what they share."""
    for name, member in members.items():
        if (base := getattr(member, "base", None)) is not None:
            _check(name, member, base, members)


def _said(member: Any) -> Any:
    """What is said of a member, by name."""
    if isinstance(member, BaseModel):
        return {field: getattr(member, field) for field in member.model_fields_set}
    return member


def _names_a_base(member: Any) -> bool:
    return isinstance(member, dict) and isinstance(member.get("base"), str)


def _filled(name: str, members: Mapping[str, Any]) -> dict[str, Any]:
    own, where = members[name], f"members.{name}.base"
    _require_base(where, own["base"], members)
    base = members[own["base"]]
    return {**{field: value for field, value in base.items() if field not in NOT_HANDED_ON}, **own}


def _require_base(where: str, base: str, members: Mapping[str, Any]) -> None:
    whole = sorted(other for other, said in members.items() if isinstance(said, dict) and not said.get("base"))
    if base not in members:
        raise ValueError(f"{where}: {base!r} is not declared under members; a base is one of {whole}")
    if base not in whole:
        raise ValueError(f"{where}: {base!r} has no weights of its own to adapt; a base is one of {whole}")


def _check(name: str, member: BaseModel, base: str, members: Mapping[str, BaseModel]) -> None:
    _require_base(f"members.{name}.base", base, {other: _said(each) for other, each in members.items()})
    whole = members[base]
    if getattr(whole, "host", None) is not None:
        raise ValueError(
            f"members.{name}.base: {base!r} has a host, and an adapter shares the memory of a base in the server's "
            "process; drop the host, or serve the adapter as a member of its own: merged into its base, or named by "
            "`host.server.served` where the other server has it loaded"
        )
    for field in OF_ITS_BASE:
        own, wanted = getattr(member, field), getattr(whole, field)
        if own != wanted:
            raise ValueError(
                f"members.{name}.{field}: {own!r}, but the weights are those of {base!r}, which has {wanted!r}; drop "
                "the field"
            )
    own_len, most = getattr(member, "max_len", 0), getattr(whole, "max_len", 0)
    if own_len > most:
        raise ValueError(
            f"members.{name}.max_len: {own_len} is more than the {most} of its base {base!r}; lower it"
        )

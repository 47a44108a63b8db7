"""Paths of a configuration's file: relative ones belong to its folder. No torch.

Does not know how the file is read.
"""

from __future__ import annotations

from pathlib import Path

from ensemble_core.council_config import CouncilConfig
from ensemble_core.hosts import HostConfig
from ensemble_core.member_config import MemberConfig
from ensemble_core.server_config import ServerConfig


def server_at(server: ServerConfig, folder: Path) -> ServerConfig:
    """The server's section with whole paths. folder: of the configuration's file, here and below."""
    names = ("api_key_file", "tls_cert_file", "tls_key_file", "files_folder")
    files = {name: getattr(server, name) for name in names}
    found = {name: (folder / file.expanduser()).resolve() for name, file in files.items() if file is not None}
    return server.model_copy(update=found)


def member_at(member: MemberConfig, folder: Path) -> MemberConfig:
    """A member's section with whole paths."""
    return member.model_copy(
        update={
            "model": _resolve_model(member.model, folder),
            "adapter": None if member.adapter is None else _resolve_model(member.adapter, folder),
            "chat_template": _resolve_template(member.chat_template, folder),
            "host": _resolve_host(member.host, folder),
        }
    )


def council_at(council: CouncilConfig, folder: Path) -> CouncilConfig:
    """A council's section with whole paths."""
    files = {name: getattr(council, name, None) for name in ("artefact", "examples")}
    found = {name: (folder / file.expanduser()).resolve() for name, file in files.items() if file is not None}
    return council.model_copy(update=found)


def _resolve_model(model: str, folder: Path) -> str:
    """A path that starts with . or ~ is a folder; everything else is left to the hub or the demo store."""
    if model.startswith((".", "~")):
        return str((folder / Path(model).expanduser()).resolve())
    return model


def _resolve_host(host: HostConfig | None, folder: Path) -> HostConfig | None:
    if host is None or host.server is None or host.server.ca_file is None:
        return host
    ca_file = (folder / host.server.ca_file.expanduser()).resolve()
    return HostConfig(server=host.server.model_copy(update={"ca_file": ca_file}))


def _resolve_template(template: str | None, folder: Path) -> str | None:
    if template is not None and template.endswith(".jinja"):
        return str((folder / Path(template).expanduser()).resolve())
    return template

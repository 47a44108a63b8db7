"""The YAML section of the server: sockets, keys, limits, logs. No torch.

Does not know members or recipes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from ensemble_core.errors import ConfigError
from ensemble_core.limits import LimitsConfig, OverridesConfig
from ensemble_core.section import Section, Size, lines_of


class ServerConfig(Section):
    """The HTTP server."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one.")
    root_path: str = Field(
        "", pattern=r"^(/[^/?#\s]+)*$", description="Path that a proxy gives this server, for example /llm."
    )
    api_keys: tuple[SecretStr, ...] = Field(
        (), description="A client needs one of these; none set: none is needed."
    )
    api_key_env: str | None = Field(
        None, min_length=1, description="Environment variable with more keys, comma separated."
    )
    api_key_file: Path | None = Field(None, description="File with more keys, one per line; # begins a comment.")
    admin_keys: tuple[SecretStr, ...] = Field(
        (), description="Keys that open /v1/admin, and nothing else; none set: those routes do not exist."
    )
    admin_key_env: str | None = Field(
        None, min_length=1, description="Environment variable with more of them, comma separated."
    )
    protect_metrics: bool = Field(True, description="Whether /metrics needs a key as well, if keys are set.")
    cors_origins: tuple[str, ...] = Field((), description="Web pages that may call: https://a.org, or * for all.")
    tls_cert_file: Path | None = Field(None, description="PEM certificate chain; with tls_key_file: HTTPS.")
    tls_key_file: Path | None = Field(None, description="PEM private key.")
    tls_key_password_env: str | None = Field(
        None, min_length=1, description="Environment variable with the private key's password."
    )
    max_body_bytes: Size = Field(4 * 2**20, ge=1024, description="Larger bodies get a 413.")
    max_choices: int = Field(128, ge=1, description="Most prompts x n of one request.")
    drain_seconds: float = Field(30.0, ge=0.0, description="How long requests may go on at shutdown.")
    allowed_hosts: tuple[str, ...] | None = Field(
        None,
        description="Host names that requests may address, or * for any. None: any, but on loopback without keys "
        "only localhost and IP addresses, so that no web page can reach the server under its own name.",
    )
    files_folder: Path | None = Field(
        None, description="Where /v1/files and /v1/batches keep what they are given; None: both are off."
    )
    limits: LimitsConfig = Field(default_factory=lambda: LimitsConfig())
    allow_overrides: OverridesConfig = Field(default_factory=lambda: OverridesConfig())
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Of our loggers.")
    log_format: Literal["text", "json"] = Field("text", description="Lines of text, or one JSON object a line.")
    access_log: bool = Field(True, description="Log one line for each request, without prompts.")
    playground: bool = Field(True, description="Serve the page that shows how a text is fused, at /, to browsers.")
    traces: bool = Field(
        False, description="Send a span for each request; OTEL_* variables configure it. Needs unisono[otel]."
    )

    @model_validator(mode="after")
    def _tls_pair(self) -> ServerConfig:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together; set both or neither")
        if self.tls_key_password_env is not None and self.tls_key_file is None:
            raise ValueError("tls_key_password_env only acts with tls_key_file; set it or drop it")
        return self

    def replaced(self, **chosen: object) -> ServerConfig:
        """The section with some fields replaced and checked. Raises ConfigError as `load_config` does."""
        try:
            return ServerConfig.model_validate({**dict(self), **chosen})
        except ValidationError as error:
            raise ConfigError("; ".join(lines_of(error, "server"))) from error

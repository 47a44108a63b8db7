"""What all commands share: the configuration's option, errors in one line, quiet logs. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.errors import UnisonoError

ConfigPath = Annotated[
    Path, typer.Option("--config", "-c", envvar="UNISONO_CONFIG", help="The YAML configuration file.")
]
DEFAULT_CONFIG = Path("configs/demo.yaml")


@contextmanager
def one_line_errors() -> Generator[None]:
    """Turn a UnisonoError into one line and exit code 1."""
    try:
        yield
    except UnisonoError as error:
        message = " ".join(str(error).split())
        say(f"unisono: {message}")
        raise typer.Exit(1) from error


def say(line: str) -> None:
    """Show a line on stderr."""
    typer.echo(line, err=True)


def load(path: Path) -> Config:
    """The configuration, with logging set to its level and format."""
    from server.edge import logs

    config = load_config(path)
    logs.configure(config.server.log_level, config.server.log_format)
    return config


def load_quietly(path: Path) -> Config:
    """The configuration, with logging set to warnings so that the output is the result alone."""
    from server.edge import logs

    logs.configure("warning")
    return load_config(path)

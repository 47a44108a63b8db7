"""Reads a configuration's file: YAML into checked sections, errors in one line. No torch.

Invariant: no message quotes the file. Does not know what the sections mean.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import (
    ValidationError,
)

from ensemble_core.config import Config
from ensemble_core.errors import ConfigError
from ensemble_core.section import lines_of


def load_config(path: str | Path) -> Config:
    """Read and check a YAML file. Relative paths in it are resolved against its folder.

    Raises ConfigError that gives, for each wrong field, its path, what is wrong and what was given.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass --config FILE") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_line(error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections (members, ensembles, ...), found {type(raw).__name__}")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(lines_of(error))) from error
    config = config.at(path.resolve().parent)
    config._source = path
    return config


def _yaml_line(error: yaml.YAMLError) -> str:
    """What is wrong and where. Never quotes the line itself, which may hold a key."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"

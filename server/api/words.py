"""The names of fields in errors: the engine's on one side, an endpoint's on the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from ensemble_core.errors import InvalidRequestError


@contextmanager
def named(rename: Callable[[str], str]) -> Generator[None]:
    """Rename the field of an InvalidRequestError, in its message, too, where that begins with it."""
    try:
        yield
    except InvalidRequestError as error:
        param = error.param or ""
        if (name := rename(param)) == param:
            raise
        message = str(error)
        if message.startswith(param):
            message = name + message.removeprefix(param)
        raise InvalidRequestError(message, name) from error

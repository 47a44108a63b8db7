"""All typed errors, in one tree.

Every error that a user can cause or must act on is a `UnisonoError`. Its message names the field, what was given,
what is allowed and what to do. This file does not know HTTP; `server/edge/errors.py` maps the tree to statuses.
"""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def quoted(value: object) -> str:
    """A value that a client chose, for a message: its repr, cut in the middle where it is long."""
    return _SHORT.repr(value)


def shortened(text: str) -> str:
    """Text that a client chose, as `quoted`, without the marks around it."""
    return quoted(text)[1:-1]


class UnisonoError(Exception):
    """Root of all errors that Unisono raises on purpose."""


class ConfigError(UnisonoError):
    """A configuration file that cannot be used. The message gives the path of the field."""


class InvalidRequestError(UnisonoError):
    """A request that cannot be served as it stands. `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(UnisonoError):
    """The request names a model that is neither an ensemble nor a member."""


class NotStoredError(UnisonoError):
    """The request names a file or a batch that its client does not have."""


class QueueFullError(UnisonoError):
    """The bounded queue of waiting sequences is full; the client should try again later."""


class NotReadyError(UnisonoError):
    """The engine is loading, draining or dead and cannot take a request now."""


class MemberAwayError(NotReadyError):
    """The model needs members that are unloaded, asleep or on their way; once they are back it serves again."""


class ChangeConflictError(UnisonoError):
    """A change of members or recipes that cannot be made now: another is under way, or a member does not rest."""


class RequestTimeoutError(UnisonoError):
    """A request took longer than `server.limits.request_seconds`."""


class SlowReaderError(UnisonoError):
    """A client left more of its answer unread than `server.limits.stream_buffer`."""


class MemberError(UnisonoError):
    """A call to a member failed. Only the requests in that call are affected."""

    def __init__(self, member: str, message: str) -> None:
        super().__init__(f"member {member!r}: {message}")
        self.member = member


class MemberTimeoutError(MemberError):
    """A call to a member took longer than `scheduler.member_timeout`."""


class MemberLostError(MemberError):
    """A member that lives elsewhere cannot be reached, or has lost what it had cached."""


class HostError(UnisonoError):
    """A member's host cannot be had at start: no node, no server, or one that does not fit. Says what to do."""


class WireError(UnisonoError):
    """A message from or to a remote member is damaged, contradicts itself or has another version."""


class ConstraintError(UnisonoError):
    """The text of a request can no longer have its form. Ends only that request.

    field: the client's name of the form. noun: what it is.
    """

    def __init__(self, field: str, noun: str, reason: str) -> None:
        super().__init__(f"{field}: the text cannot follow its {noun}: {reason}; simplify it")
        self.reason = reason


class CouncilError(UnisonoError):
    """A council cannot come to an answer: too few of its models answered, or a limit of the request was reached."""


class ArtefactError(UnisonoError):
    """What `unisono fit` has learnt is missing, damaged, or was learnt for other models."""


class CheckpointError(UnisonoError):
    """Model files are missing, damaged, or could not be fetched."""


class UnsupportedModelError(UnisonoError):
    """A model (or its tokenizer) that cannot work as a member, with the reason."""


class TransferMatrixError(UnisonoError):
    """A transfer matrix that is missing, damaged, or made for other vocabularies."""


class UnknownStrategyError(UnisonoError):
    """No strategy is registered under this name; the message lists the known names."""


class EvaluationError(UnisonoError):
    """A task, a folder of results or a choice of models that cannot be evaluated. Names file, line and field."""

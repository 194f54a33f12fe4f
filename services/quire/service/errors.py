"""The one tree of errors. Each service's server maps it to its protocol's statuses in one table.

An error's message is for the person who sent the request or set the flag: it names the field, the value and the fix.
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(Enum):
    """What kind of failure it is; the values are the names of `quire.v1.ErrorCode` without their prefix."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"
    CANCELLED = "CANCELLED"


class QuireError(Exception):
    """Base of all errors that cross a service's edge.

    `field` is the request's field at fault in the contract's names ("sampling.top_p"), empty if none is.
    `retry_after` is after how many seconds the same request may fare better, None if that is not known.
    """

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries inside a service; keyword-only arguments need help to be unpickled.
        return (_rebuild, (type(self), self.message, self.field, self.retry_after))


class InvalidRequestError(QuireError):
    """The request is at fault: sending it again changes nothing."""

    code = ErrorCode.INVALID_ARGUMENT


class NotFoundError(QuireError):
    """What the request names is not served here."""

    code = ErrorCode.NOT_FOUND


class OverloadedError(QuireError):
    """The queue is full; later there may be room."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class DeadlineExceededError(QuireError):
    """The request's own deadline passed."""

    code = ErrorCode.DEADLINE_EXCEEDED


class UnavailableError(QuireError):
    """This peer can't serve the request now; another may."""

    code = ErrorCode.UNAVAILABLE


class CancelledRequestError(QuireError):
    """The one who sent the request took it back."""

    code = ErrorCode.CANCELLED


class InternalError(QuireError):
    """A fault of ours."""

    code = ErrorCode.INTERNAL


class ConfigError(QuireError):
    """A flag or file that a service was started with is wrong; the process ends with this message."""

    code = ErrorCode.INVALID_ARGUMENT


class ModelError(ConfigError):
    """The model can't be found, read or run."""


ERROR_TYPES: dict[ErrorCode, type[QuireError]] = {
    error.code: error
    for error in (
        InvalidRequestError,
        NotFoundError,
        OverloadedError,
        DeadlineExceededError,
        UnavailableError,
        CancelledRequestError,
        InternalError,
    )
}


def error_of(code: ErrorCode, message: str, field: str = "", retry_after: float | None = None) -> QuireError:
    """The error of the tree that carries `code`."""
    return ERROR_TYPES[code](message, field=field, retry_after=retry_after)


def _rebuild(kind: type[QuireError], message: str, field: str, retry_after: float | None) -> QuireError:
    return kind(message, field=field, retry_after=retry_after)

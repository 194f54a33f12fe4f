"""Errors that only the gateway raises, as leaves of the one tree in `quire.service.errors`.

They are types of their own because OpenAI's clients tell them apart by status or `code` (see `openai.errors`).
"""

from __future__ import annotations

from quire.service.errors import (
    CancelledRequestError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)


class AuthenticationError(InvalidRequestError):
    """No API key, or one that is not known or has expired."""


class RateLimitError(OverloadedError):
    """An API key has used what it may for now."""


class BusyError(UnavailableError):
    """The gateway serves as many requests as it may."""


class SlowRequestError(InvalidRequestError):
    """The request did not arrive in time."""


class StalledReaderError(CancelledRequestError):
    """The client does not read its answer."""


class BodyTooLargeError(InvalidRequestError):
    """The request's body is longer than the gateway reads."""


class ContextLengthError(InvalidRequestError):
    """Prompt and output together don't fit the model's context."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that this gateway does not serve."""


class RouteNotFoundError(NotFoundError):
    """No such path."""


class MethodNotAllowedError(InvalidRequestError):
    """The path exists, the method does not."""


def stalled_reader(seconds: float) -> StalledReaderError:
    """The last that a client hears which has not read for `seconds`."""
    return StalledReaderError(f"the client has read nothing for {seconds:g} s: read faster, or ask for less at once")

"""The one tree of errors in OpenAI's shape: status, type and code in one table."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from quire.gateway.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ContextLengthError,
    MethodNotAllowedError,
    ModelNotFoundError,
    RateLimitError,
    RouteNotFoundError,
    SlowRequestError,
    StalledReaderError,
)
from quire.service.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    QuireError,
    UnavailableError,
)


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How a kind of error looks to OpenAI's clients. They retry 429 and 5xx by themselves."""

    status: int
    type: str
    code: str | None


SHAPES: dict[type[QuireError], ErrorShape] = {
    InvalidRequestError: ErrorShape(400, "invalid_request_error", None),
    ContextLengthError: ErrorShape(400, "invalid_request_error", "context_length_exceeded"),
    BodyTooLargeError: ErrorShape(413, "invalid_request_error", "body_too_large"),
    AuthenticationError: ErrorShape(401, "invalid_request_error", "invalid_api_key"),
    SlowRequestError: ErrorShape(408, "invalid_request_error", "request_timeout"),
    MethodNotAllowedError: ErrorShape(405, "invalid_request_error", "method_not_allowed"),
    NotFoundError: ErrorShape(404, "invalid_request_error", "not_found"),
    ModelNotFoundError: ErrorShape(404, "invalid_request_error", "model_not_found"),
    RouteNotFoundError: ErrorShape(404, "invalid_request_error", "unknown_url"),
    OverloadedError: ErrorShape(429, "rate_limit_error", "overloaded"),
    RateLimitError: ErrorShape(429, "rate_limit_error", "rate_limit_exceeded"),
    DeadlineExceededError: ErrorShape(504, "server_error", "deadline_exceeded"),
    UnavailableError: ErrorShape(503, "server_error", "unavailable"),
    # Only an event of a stream has this one.
    StalledReaderError: ErrorShape(408, "invalid_request_error", "reader_stalled"),
    # The client went away: nobody reads this status, but logs and proxies know it by nginx's number.
    CancelledRequestError: ErrorShape(499, "server_error", "cancelled"),
    InternalError: ErrorShape(500, "server_error", "internal"),
    QuireError: ErrorShape(500, "server_error", "internal"),
}


def shape_of(error: QuireError) -> ErrorShape:
    """The shape of the nearest ancestor of `error`'s type that the table has."""
    return next(SHAPES[kind] for kind in type(error).__mro__ if kind in SHAPES)


def error_body(error: QuireError) -> bytes:
    """The JSON of `error`."""
    shape = shape_of(error)
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": shape.type, "param": error.field or None, "code": shape.code}}
    )

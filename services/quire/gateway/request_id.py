"""The id of a request, as both APIs take it from the client (X-Request-Id) and send it back."""

from __future__ import annotations

import uuid

from quire.service.errors import InvalidRequestError

HEADER = "X-Request-Id"
_MAX_LENGTH = 256


def new_request_id() -> str:
    """For a request whose client gave it none."""
    return f"req-{uuid.uuid4().hex}"


def check_request_id(wanted: str) -> None:
    """Raises InvalidRequestError if `wanted` can't be an id: it goes into headers and logs."""
    if not (0 < len(wanted) <= _MAX_LENGTH and wanted.isascii() and wanted.isprintable()):
        raise InvalidRequestError(
            f"{HEADER} has {len(wanted)} characters: send 1 to {_MAX_LENGTH}, printable ASCII", field=HEADER
        )

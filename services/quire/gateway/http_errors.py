"""Errors as HTTP answers, in OpenAI's shape. Every route's errors end up here."""

from __future__ import annotations

import math

from starlette.responses import Response

from quire.gateway.errors import AuthenticationError
from quire.gateway.exchange import Exchange
from quire.gateway.openai.errors import error_body, shape_of
from quire.gateway.openai.responses import error_event
from quire.service.errors import OverloadedError, QuireError, UnavailableError


def error_response(error: QuireError) -> Response:
    """The answer that `error` is, if nothing has been answered yet."""
    headers = {"content-type": "application/json"}
    if isinstance(error, OverloadedError | UnavailableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), shape_of(error).status, headers=headers)


async def answer_error(exchange: Exchange, error: QuireError) -> None:
    """Ends `exchange` with `error`, however much of its answer is out."""
    if exchange.complete:
        return
    if exchange.started:
        await exchange.finish(error_event(error))
        return
    response = error_response(error)
    await exchange.start(response.status_code, dict(response.headers))
    await exchange.finish(bytes(response.body))

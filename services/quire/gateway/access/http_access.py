"""API keys over HTTP: nothing but health, readiness and metrics is answered without one, once there is a key file."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quire.gateway.access.gate import Gate
from quire.gateway.errors import AuthenticationError
from quire.service.errors import QuireError

# For probes and scrapers, which have no keys and learn nothing of anybody's requests.
_OPEN = frozenset(("/health", "/ready", "/metrics"))


class Authentication:
    """Puts the Caller into `scope["quire.caller"]`, or answers with what `refusal` makes of the error."""

    def __init__(self, app: ASGIApp, gate: Gate, refusal: Callable[[QuireError], ASGIApp]) -> None:
        self._app = app
        self._gate = gate
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["path"] not in _OPEN:
            try:
                scope["quire.caller"] = self._gate.caller(Headers(scope=scope).get("authorization"))
            except AuthenticationError as error:
                app = self._refusal(error)
        await app(scope, receive, send)

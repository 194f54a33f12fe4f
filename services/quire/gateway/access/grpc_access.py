"""API keys over gRPC: an interceptor that refuses every call without one, once there is a key file.

It is in front of all methods, those that are still to be written included; health and reflection stay open. Servicers
ask the gate again for the Caller, which costs them a hash.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeAlias

import grpc

from quire.gateway.access.gate import Gate
from quire.gateway.errors import AuthenticationError

_OPEN = ("/grpc.health.", "/grpc.reflection.")

_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"


class Authentication(grpc.aio.ServerInterceptor):
    """Ends calls without a valid key with UNAUTHENTICATED."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called for every call, before its messages are read."""
        if not handler_call_details.method.startswith(_OPEN):
            try:
                self._gate.caller(authorization(handler_call_details.invocation_metadata))
            except AuthenticationError as error:
                return _refusing(error.message)
        return await continuation(handler_call_details)


def authorization(metadata: Any) -> str | None:
    """The `authorization` of a call's metadata."""
    return next((str(value) for name, value in metadata or () if name == "authorization"), None)


def _refusing(message: str) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    # As a stream of requests and one response it fits a call of any kind: nothing is read and nothing is answered.
    return grpc.stream_unary_rpc_method_handler(refuse)

"""An interceptor that answers a message which is none of the contract's with INVALID_ARGUMENT.

gRPC itself takes one for a bug of the server: UNKNOWN, and a traceback in its log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from quire.gateway.grpc_api import SERVICE
from quire.service.errors import InvalidRequestError
from quire.service.grpc_server import abort

_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"


class MalformedMessages(grpc.aio.ServerInterceptor):
    """For the public service, whose methods all take one message and are coroutines."""

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called for every call, before its message is read."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return handler
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        method = _refusing(handler.unary_stream or handler.unary_unary)
        return make(method, _decoding(handler.request_deserializer), handler.response_serializer)


def _decoding(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw) if decode is not None else raw
        except DecodeError as error:
            return error

    return decoded


def _refusing(method: Callable[..., Any] | None) -> Callable[..., Any]:
    async def refuse_or_serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, DecodeError) or method is None:
            await abort(context, InvalidRequestError(f"the message is not the contract's: {request}"))
        return await method(request, context)

    return refuse_or_serve

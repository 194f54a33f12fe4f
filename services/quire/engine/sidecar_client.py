"""The server's line to the sidecar: compiles a request's grammar before the core hears of it."""

from __future__ import annotations

import grpc

from quire.service.errors import InternalError, InvalidRequestError, OverloadedError, UnavailableError
from quire.service.grpc_server import channel
from quire.service.request import Constraint, TraceContext
from quire.service.wire import constraint_to_proto
from quire.v1 import grammar_pb2, grammar_pb2_grpc


class SidecarClient:
    """Calls GrammarService.Compile; masks go another way (see `sidecar_masks`)."""

    def __init__(self, address: str, deadline_s: float) -> None:
        self._channel = channel(address)
        self._stub: grammar_pb2_grpc.GrammarServiceAsyncStub = grammar_pb2_grpc.GrammarServiceStub(self._channel)
        self._deadline_s = deadline_s

    async def compile(self, constraint: Constraint, trace: TraceContext, tenant: str = "") -> None:
        """Compiles into the tenant's part of the sidecar's cache.

        Raises InvalidRequestError if the constraint is at fault, OverloadedError if too many others are being compiled,
        UnavailableError if the sidecar can't be reached.
        """
        metadata = [
            (name, value)
            for name, value in (("traceparent", trace.traceparent), ("tracestate", trace.tracestate))
            if value
        ]
        request = grammar_pb2.CompileRequest(constraint=constraint_to_proto(constraint), cache_salt=tenant)
        try:
            await self._stub.Compile(request, timeout=self._deadline_s, metadata=metadata, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                field = dict(error.trailing_metadata() or ()).get("quire-field", "constraint")
                raise InvalidRequestError(details, field=str(field)) from error
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise OverloadedError(details) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise UnavailableError(f"the grammar sidecar does not answer: {details}") from error
            raise InternalError(f"the grammar sidecar failed: {details}") from error

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

"""A gRPC server as every service runs it: with health, reflection and the limits that all share.

Addresses are gRPC's: `127.0.0.1:9000`, `[::]:9000`, `unix:/run/quire/engine.sock`. A unix socket does not leave the
machine and has the file system's rights: it is plain even where TLS is asked for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from quire.service.errors import ConfigError, ErrorCode, QuireError

# A cache snapshot of a million pages is 16 MB; a prompt of a million tokens 4 MB.
MAX_MESSAGE_BYTES = 64 << 20

# The session between two services lives for days and is silent when nobody asks anything: pings keep it from being
# dropped on the way and notice a peer that vanished without a goodbye.
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

STATUS_OF: dict[ErrorCode, grpc.StatusCode] = {
    ErrorCode.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorCode.CANCELLED: grpc.StatusCode.CANCELLED,
}

_WATCH_HEALTH = "/grpc.health.v1.Health/Watch"

# For streams that the end of the grace period ended to say so.
_LAST_SECONDS = 1.0

S = TypeVar("S")


class GrpcServer:
    """One listening address, or several with commas between them, with a set of services, health and reflection.

    `add` registers a servicer under its full name ("quire.v1.GrammarService"); health answers NOT_SERVING for every
    one of them, and for the empty name, until `set_serving(True)`.
    """

    def __init__(
        self,
        address: str,
        *,
        options: Sequence[tuple[str, int]] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._streams = _Streams()
        # Of an option that is given twice, gRPC takes the first.
        merged = {**dict(SERVER_OPTIONS), **dict(options)}
        self.server = grpc.aio.server(options=list(merged.items()), interceptors=[*interceptors, self._streams])
        self._addresses = [each.strip() for each in address.split(",")]
        self._credentials = credentials
        self._names = [""]
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    def add(self, name: str, register: Callable[[S, grpc.aio.Server], None], servicer: S) -> None:
        """Registers `servicer` with the generated `add_…Servicer_to_server` function."""
        register(servicer, self.server)
        self._names.append(name)

    async def start(self) -> str:
        """Listens; returns the first address, to be dialled, with the port that was chosen. Raises ConfigError."""
        services = [*self._names[1:], health_pb2.DESCRIPTOR.services_by_name["Health"].full_name]
        reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], self.server)
        dialled = [self._listen_on(address) for address in self._addresses]
        await self.set_serving(False)
        await self.server.start()
        return dialled[0]

    def _listen_on(self, address: str) -> str:
        try:
            if self._credentials is None or _is_local(address):
                port = self.server.add_insecure_port(address)
            else:
                port = self.server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"can't listen on {address}: choose an address that is free and allowed", field="listen"
            ) from error
        return address if _is_local(address) else f"{address.rpartition(':')[0]}:{port}"

    async def set_serving(self, serving: bool) -> None:
        """What health answers from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, status)

    async def stop(self, grace: float = 5.0) -> None:
        """Ends every call within `grace` seconds and stops listening."""
        await self.set_serving(False)
        self._streams.end(_WATCH_HEALTH)
        stopping = asyncio.create_task(self.server.stop(grace + _LAST_SECONDS))
        await asyncio.wait((stopping,), timeout=grace)
        self._streams.end()
        await stopping


class _Streams(grpc.aio.ServerInterceptor):
    """Every streamed answer under way, so that the server's stop can end it.

    Most go on for as long as both sides live. gRPC would cut them off too, but logs each as an exception that nobody
    handled.
    """

    def __init__(self) -> None:
        self._methods: dict[asyncio.Task[None], str] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handlers of calls that answer with a stream."""
        handler = await continuation(handler_call_details)
        answers = (handler.stream_stream or handler.unary_stream) if handler is not None else None
        if handler is None or answers is None:
            return handler
        behavior = partial(self._run, str(handler_call_details.method), answers)
        wrap = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return wrap(behavior, handler.request_deserializer, handler.response_serializer)

    def end(self, method: str = "") -> None:
        """Ends all of them, or those of one method, with UNAVAILABLE."""
        for task, name in self._methods.items():
            if method in ("", name):
                task.cancel()

    async def _run(self, method: str, handler: Callable[[Any, Any], Any], request: Any, context: Any) -> None:
        task = asyncio.create_task(_answer(handler(request, context), context))
        self._methods[task] = method
        try:
            await asyncio.wait((task,))
        finally:
            del self._methods[task]
            if task.cancel():
                await asyncio.wait((task,))
        if task.cancelled() and task.cancelling():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        task.result()


async def _answer(answers: Any, context: Any) -> None:
    """Runs a handler of either kind: one that yields what it answers, or one that writes it."""
    if not isinstance(answers, AsyncGenerator):
        await answers
        return
    async with aclosing(answers):
        async for answer in answers:
            await context.write(answer)


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: QuireError, *, linger: float | None = None
) -> NoReturn:
    """Ends a call with `error`'s status; `quire-field` and `retry-after` (seconds) travel in the trailing metadata.

    A status waits until the client has read what was sent before it: for `linger` seconds, then the call is reset.
    """
    trailing = [("quire-field", error.field)] if error.field else []
    if error.retry_after is not None:
        trailing.append(("retry-after", str(math.ceil(error.retry_after))))
    try:
        async with asyncio.timeout(linger):
            await context.abort(STATUS_OF[error.code], error.message, tuple(trailing))
    except TimeoutError:
        # gRPC resets a call that its handler leaves like this.
        raise asyncio.CancelledError from None


def channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    name: str = "",
    options: Sequence[tuple[str, int]] = (),
) -> grpc.aio.Channel:
    """A channel to another service, with the options that all share and `options`, which come before those.

    `name` is what the peer's certificate says, if that is not the host in `address`.
    """
    merged: list[tuple[str, str | int]] = [*{**dict(CHANNEL_OPTIONS), **dict(options)}.items()]
    if credentials is None or _is_local(address):
        return grpc.aio.insecure_channel(address, options=merged)
    # A connection of its own: one that another channel made may have been checked against other certificates.
    merged.append(("grpc.use_local_subchannel_pool", 1))
    if name:
        merged.append(("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(address, credentials, options=merged)


def _is_local(address: str) -> bool:
    return address.startswith("unix:")

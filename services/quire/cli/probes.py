"""How `quire serve` knows what its services are doing: gRPC health, and an engine's status while it loads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.service.grpc_server import CHANNEL_OPTIONS
from quire.v1 import engine_pb2, engine_pb2_grpc

# A service that is starting does not listen yet; it is on this machine, so looking for it often costs nothing.
_CHANNEL_OPTIONS = list(
    {
        **dict(CHANNEL_OPTIONS),
        "grpc.min_reconnect_backoff_ms": 100,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 100,
    }.items()
)
_POLL_SECONDS = 0.1


async def until_serving(address: str) -> None:
    """Returns when the server at `address` says that it serves, however often it is started again until then."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError as error:
                # The process ended, or another took its place. Any other status is a bug.
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise


async def follow_loading(address: str, report: Callable[[str, float], None]) -> None:
    """Reports what the engine at `address` is busy with, and how much of it is done, until it is ready."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        while True:
            try:
                status = await stub.GetStatus(engine_pb2.GetStatusRequest(), wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                continue
            if status.phase != engine_pb2.ENGINE_PHASE_LOADING:
                return
            report(status.activity, status.progress)
            await asyncio.sleep(_POLL_SECONDS)

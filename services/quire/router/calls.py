"""Calls to an engine that end with a reason, whichever way gRPC tells it. Used by the link and its watches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol, TypeVar, cast

import grpc

T = TypeVar("T")
M_co = TypeVar("M_co", covariant=True)


class LostError(Exception):
    """What the router had with an engine is over; the message says why."""


class CallEndedError(LostError):
    """A call has ended; another may fare better."""


class BrokenContractError(LostError):
    """The engine does not keep to the contract; the next call will hardly find it changed."""


class StalledError(LostError):
    """The engine has work and does nothing."""


class ResponseStream(Protocol[M_co]):
    """A gRPC call that answers with a stream."""

    async def read(self) -> M_co | object:
        """The next message, or `grpc.aio.EOF`."""

    def cancel(self) -> bool:
        """Ends the call."""


async def next_message(call: ResponseStream[T]) -> T:
    """The call's next message. Raises CallEndedError if there is none, however the call ended.

    It reads instead of iterating: gRPC's iterator is an async generator, which outlives the task that leaves it early.
    """
    message = await outcome(call.read())
    if message is grpc.aio.EOF:
        raise CallEndedError("it ended the call")
    return cast(T, message)


async def outcome(answer: Awaitable[T]) -> T:
    """What a call answers. Raises CallEndedError if it fails or is cancelled by the engine."""
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        raise CallEndedError(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError:
        # gRPC raises it for the peer's CANCELLED, too; then this task was not cancelled and goes on.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CallEndedError("CANCELLED: by the engine") from None

"""The router's gRPC side: one `Session` call per gateway. Translates; the core does the work.

A gateway that does not read must neither stall the others nor fill the memory: each session has a queue of its own,
and one that holds more than `max_queued_updates` ends its session. Its requests are cancelled at once; the gateway
submits them again, with the tokens it has, when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc

from quire.router.core import Router
from quire.router.flight import Peer
from quire.service.errors import InvalidRequestError, OverloadedError, QuireError, UnavailableError
from quire.service.grpc_server import abort
from quire.service.request import Update
from quire.service.wire import request_from_proto, update_to_proto
from quire.v1 import session_pb2, session_pb2_grpc

SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name

# Updates in a frame to which no more are added.
_FULL = 256

_Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Gateways come in here; `close` lets them go when the router ends."""

    def __init__(self, name: str, router: Router, *, max_queued_updates: int) -> None:
        self._name = name
        self._router = router
        self._max_queued_updates = max_queued_updates
        self._sessions: set[_Session] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    # A coroutine that writes, not a generator: a generator that waits for a slow reader can't be told to stop.
    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[session_pb2.SessionRequest], context: _Context
    ) -> None:
        """Hello and welcome, then requests in and frames out until either side has enough."""
        if self._router.draining:
            await abort(context, UnavailableError("the router is shutting down: open a session with another"))
        session = _Session(self._router, self._max_queued_updates)
        self._sessions.add(session)
        self._empty.clear()
        try:
            await session.run(request_iterator, context, self._welcome())
        except QuireError as error:
            logger.warning("session ended: %s", error.message, extra={"peer": session.name})
            await abort(context, error)
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._empty.set()

    async def close(self, patience: float) -> None:
        """Ends every session once its last frame is sent; returns when all have ended, or after `patience` seconds."""
        for session in self._sessions:
            session.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._empty.wait()

    def _welcome(self) -> session_pb2.Welcome:
        models = self._router.fleet.models
        return session_pb2.Welcome(server=self._name, model=models[0] if len(models) == 1 else "")


class _Session:
    """A gateway's side of the core."""

    def __init__(self, router: Router, max_queued_updates: int) -> None:
        self.name = ""
        self._router = router
        self._peer = Peer(self._deliver, self._announce_drain)
        self._frames: asyncio.Queue[session_pb2.SessionResponse | None] = asyncio.Queue()
        # The newest frame, as long as it waits: what comes meanwhile goes along, since each frame has its price.
        self._open: session_pb2.StepFrame | None = None
        self._queued_updates = 0
        self._max_queued_updates = max_queued_updates
        self._overrun = asyncio.Event()

    async def run(
        self, requests: AsyncIterator[session_pb2.SessionRequest], context: _Context, welcome: session_pb2.Welcome
    ) -> None:
        """Serves until the gateway hangs up or `close`; raises the error that ended the session, if one did."""
        await self._hello(requests)
        await context.write(session_pb2.SessionResponse(welcome=welcome))
        self._router.join(self._peer)
        # Written by a task of its own: a write to a gateway that does not read ends only with the call.
        parts = (self._read(requests), self._write(context), self._overrun.wait())
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._overrun.is_set():
                raise OverloadedError(
                    f"the gateway has not read {self._queued_updates} updates: open a new session and submit again"
                )
            for task in done:
                task.result()
        finally:
            self._router.leave(self._peer)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            logger.info("session with gateway ended", extra={"peer": self.name})

    def close(self) -> None:
        """No frame follows those that wait."""
        self._open = None
        self._frames.put_nowait(None)

    async def _hello(self, requests: AsyncIterator[session_pb2.SessionRequest]) -> None:
        frame = await anext(requests, None)
        kind = frame.WhichOneof("frame") if frame is not None else None
        if frame is None or kind != "hello":
            raise InvalidRequestError(f"the session began with {kind}: send hello first", field="hello")
        self.name = frame.hello.peer
        logger.info("session with gateway", extra={"peer": self.name})

    async def _read(self, requests: AsyncIterator[session_pb2.SessionRequest]) -> None:
        async for frame in requests:
            match frame.WhichOneof("frame"):
                case "submit":
                    self._submit(frame.submit)
                case "cancel":
                    self._router.cancel(self._peer, frame.cancel.key)
                case kind:
                    raise InvalidRequestError(f"a session frame holds {kind}: it must hold submit or cancel")

    def _submit(self, submit: session_pb2.Submit) -> None:
        try:
            request = request_from_proto(submit.request)
        except InvalidRequestError as error:
            self._router.refuse(self._peer, submit.key, error)
        else:
            self._router.submit(self._peer, submit.key, request)

    async def _write(self, context: _Context) -> None:
        while (frame := await self._frames.get()) is not None:
            self._open = None
            await context.write(frame)
            self._queued_updates -= len(frame.step.updates)

    def _deliver(self, updates: list[Update]) -> None:
        messages = [update_to_proto(update) for update in updates]
        self._queued_updates += len(messages)
        if self._queued_updates > self._max_queued_updates:
            self._overrun.set()
            return
        # A prompt's log-probabilities are megabytes, and a message has a largest size.
        small = not any(update.prompt_logprobs for update in updates)
        if small and self._open is not None and len(self._open.updates) < _FULL:
            self._open.updates.extend(messages)
        else:
            frame = session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=messages))
            self._open = frame.step if small else None
            self._frames.put_nowait(frame)

    def _announce_drain(self) -> None:
        self._open = None
        self._frames.put_nowait(session_pb2.SessionResponse(draining=session_pb2.Draining()))

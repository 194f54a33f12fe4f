"""The stream to one router and the watch of its health: connects, reconnects, sends and delivers frames.

`session.RouterSessions` has one for each router and decides which of them gets a request.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.gateway.call import Call
from quire.service.errors import UnavailableError
from quire.service.peer_tls import Dialer
from quire.service.wire import request_to_proto
from quire.v1 import request_pb2, session_pb2, session_pb2_grpc

SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name

# Seconds between attempts to open a stream that a router refuses; a router that isn't there at all is the channel's
# affair, which has its own backoff.
_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0

_Stream: TypeAlias = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]

logger = logging.getLogger(__name__)


class RouterLink:
    """The stream to one router and the watch of its health."""

    def __init__(
        self,
        address: str,
        peer: str,
        model: str,
        changed: Callable[[], None],
        lost: Callable[[Sequence[Call]], None],
        dialer: Dialer,
    ) -> None:
        self.address = address
        self._peer = peer
        self._model = model
        self._changed = changed
        self._lost = lost
        self._dialer = dialer
        # Keys are never used twice, not even on another stream: an update can't reach the wrong call.
        self._keys = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._outgoing: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._welcomed = False
        self._draining = False
        self._serving = False
        self._failure = "not connected yet"

    @property
    def available(self) -> bool:
        """Whether new requests may go there."""
        return self._welcomed and self._serving and not self._draining

    @property
    def reason(self) -> str:
        """Why it is not available."""
        if not self._welcomed:
            return self._failure
        if self._draining:
            return "draining"
        return "connected, but its health is not SERVING"

    @property
    def in_flight(self) -> int:
        """Requests whose terminal event has not come yet."""
        return len(self._calls)

    @property
    def calls(self) -> list[Call]:
        """The requests whose terminal event has not come yet."""
        return list(self._calls.values())

    def submit(self, call: Call) -> None:
        """Sends a call's request, with the tokens that it has already."""
        call.link, call.key = self, next(self._keys)
        self._calls[call.key] = call
        request = replace(call.request, output_token_ids=tuple(call.token_ids)) if call.token_ids else call.request
        submit = session_pb2.Submit(key=call.key, request=request_to_proto(request))
        self._outgoing.put_nowait(session_pb2.SessionRequest(submit=submit))

    def cancel(self, call: Call) -> None:
        """Takes a call back. It counts as in flight until its terminal event has come."""
        self._outgoing.put_nowait(session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=call.key)))

    async def run(self) -> None:
        """Connects and reconnects until it is cancelled."""
        delay = _FIRST_RETRY
        while True:
            failure = await self._connect()
            # A router that goes on refusing for the same reason is news only once.
            if self._welcomed or failure != self._failure:
                facts = {"router": self.address, "in_flight": self.in_flight}
                logger.warning("no session with router: %s", failure, extra=facts)
            self._failure = failure
            delay = _FIRST_RETRY if self._welcomed else min(delay * 2, _LAST_RETRY)
            self._hang_up()
            await asyncio.sleep(delay)

    async def _connect(self) -> str:
        """One channel, with one session; returns why that ended."""
        renewal = self._dialer.renewal
        async with self._dialer.channel(self.address) as router:
            session = asyncio.create_task(self._session(session_pb2_grpc.SessionServiceStub(router)))
            outdated = asyncio.create_task(self._outdated(renewal))
            health = asyncio.create_task(self._watch_health(router))
            tasks = (session, outdated, health)
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if session.cancelled():
                    # gRPC raises it for the peer's CANCELLED, too.
                    return "CANCELLED: by the router"
                if session.done():
                    return session.result()
                return outdated.result() if outdated.done() else health.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _outdated(self, renewal: asyncio.Event) -> str:
        """Returns why the channel is to be made anew: it can't connect with what it knows, and there are new files."""
        await renewal.wait()
        if self._welcomed:
            # What stands may stay; this ends with it.
            await asyncio.Event().wait()
        return "there are new certificates to connect with"

    async def _session(self, stub: session_pb2_grpc.SessionServiceAsyncStub) -> str:
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(session_pb2.SessionRequest(hello=session_pb2.Hello(peer=self._peer)))
        stream = stub.Session(wait_for_ready=True)
        writing = asyncio.create_task(self._write(stream))
        try:
            async for response in stream:
                self._receive(response)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except UnavailableError as error:
            return error.message
        finally:
            stream.cancel()
            writing.cancel()
            await asyncio.wait((writing,))
        return "it ended the session"

    async def _write(self, stream: _Stream) -> None:
        outgoing = self._outgoing
        while True:
            try:
                await stream.write(await outgoing.get())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream has ended: its reader sees that too, and why

    def _receive(self, response: session_pb2.SessionResponse) -> None:
        match response.WhichOneof("frame"):
            case "step" if self._welcomed:
                self._deliver(response.step)
            case "welcome" if not self._welcomed:
                self._welcome(response.welcome)
            case "draining" if self._welcomed:
                self._draining = True
                logger.info("router drains", extra={"router": self.address})
                self._changed()
            case frame:
                raise UnavailableError(f"it sent an unexpected frame: {frame}")

    def _welcome(self, welcome: session_pb2.Welcome) -> None:
        if welcome.model and welcome.model != self._model:
            raise UnavailableError(
                f"it serves the model {welcome.model!r} and this gateway {self._model!r}: "
                "start both with the same --model and --served-model-name"
            )
        self._welcomed = True
        logger.info("session with router", extra={"router": self.address, "server": welcome.server})
        self._changed()

    def _deliver(self, step: session_pb2.StepFrame) -> None:
        calls = self._calls
        for update in step.updates:
            call = calls.get(update.key)
            if call is None:
                logger.warning(
                    "router sent an update for no request", extra={"router": self.address, "key": update.key}
                )
                continue
            finished = update.HasField("finished")
            if finished:
                del calls[update.key]
            if call.finished is None:
                if finished and self._draining and update.finished.error.code == request_pb2.ERROR_CODE_UNAVAILABLE:
                    # It ends before the request does, or met it on the way: another router goes on with it.
                    self._lost([call])
                    continue
                call.feed(update)
                # What came made no sense and ended the call: nobody reads the rest.
                if not finished and call.finished is not None:
                    self.cancel(call)

    def _hang_up(self) -> None:
        self._welcomed = self._draining = False
        calls, self._calls = self._calls, {}
        self._changed()
        self._lost(list(calls.values()))

    async def _watch_health(self, router: grpc.aio.Channel) -> NoReturn:
        stub = health_pb2_grpc.HealthStub(router)
        while True:
            try:
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), wait_for_ready=True):
                    self._set_serving(answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.aio.AioRpcError as error:
                logger.debug("lost health of router: %s", error.details(), extra={"router": self.address})
            finally:
                self._set_serving(False)
            await asyncio.sleep(_FIRST_RETRY)

    def _set_serving(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            self._changed()

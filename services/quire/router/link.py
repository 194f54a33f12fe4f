"""The gRPC client of one engine: its session, and the watches beside it, for as long as the router lives.

The session decides: while it stands the engine is connected, when it ends everything known of the engine is void.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn, TypeAlias

import grpc

from quire.router.calls import BrokenContractError, CallEndedError, LostError, StalledError, next_message, outcome
from quire.router.core import Router
from quire.router.endpoint import Endpoint
from quire.router.metrics import RouterMetrics
from quire.router.watches import EngineWatches
from quire.service.errors import InternalError
from quire.service.pages import PAGE_SIZE
from quire.service.peer_tls import Dialer
from quire.service.request import Finished, FinishReason, Request, Update
from quire.service.stalls import until_stalled
from quire.service.wire import request_to_proto, update_from_proto
from quire.v1 import engine_pb2, engine_pb2_grpc, session_pb2, session_pb2_grpc

# Seconds between attempts with an engine that answers but refuses, as it does while it loads; one that isn't there at
# all is the channel's affair, which has its own backoff.
_FIRST_RETRY, _LAST_RETRY = 0.1, 1.0

# With one that breaks the contract: each attempt may cost requests a move, and only an upgrade will help.
_BROKEN_RETRY = 10.0

_CALL_TIMEOUT = 10.0

_Stream: TypeAlias = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]
_Outgoing: TypeAlias = asyncio.Queue[session_pb2.SessionRequest]

logger = logging.getLogger(__name__)


class EngineLink:
    """Keeps one endpoint connected.

    `peer` names this router in the engine's log. Times are in seconds: `load_interval` the shortest between two load
    reports, `stall_timeout` how long an engine with work may do nothing before it is lost. `dialer` makes the channels.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        router: Router,
        metrics: RouterMetrics,
        *,
        peer: str,
        load_interval: float,
        stall_timeout: float,
        dialer: Dialer,
    ) -> None:
        self._endpoint = endpoint
        self._router = router
        self._metrics = metrics
        self._watches = EngineWatches(endpoint, router, metrics, load_interval=load_interval)
        self._peer = peer
        self._stall_timeout = stall_timeout
        self._dialer = dialer
        self._outgoing: _Outgoing = asyncio.Queue()
        self._connected = False
        # Reasons that have been logged since the engine last worked: one that fails the same way again is no news.
        self._told: set[str] = set()

    def submit(self, key: int, request: Request) -> None:
        """Sends a request under a key of its own."""
        submit = session_pb2.Submit(key=key, request=request_to_proto(request))
        self._outgoing.put_nowait(session_pb2.SessionRequest(submit=submit))

    def cancel(self, key: int) -> None:
        """Takes it back."""
        self._outgoing.put_nowait(session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=key)))

    async def run(self) -> None:
        """Connects and reconnects until it is cancelled."""
        delay = _FIRST_RETRY
        while True:
            renewal = self._dialer.renewal
            async with self._dialer.channel(self._endpoint.address) as engine:
                lost = await self._session(engine, renewal)
            broken = isinstance(lost, BrokenContractError)
            if self._connected and not broken:
                delay = _FIRST_RETRY
                self._told.clear()
            self._tell(lost, logging.WARNING if self._connected or broken else logging.INFO)
            if self._connected:
                self._metrics.lost(self._endpoint, stalled=isinstance(lost, StalledError))
            self._connected = False
            self._router.engine_lost(self._endpoint, str(lost))
            await self._watches.sweep()
            await asyncio.sleep(_BROKEN_RETRY if broken else delay)
            delay = min(delay * 2, _LAST_RETRY)

    async def _session(self, engine: grpc.aio.Channel, renewal: asyncio.Event) -> LostError:
        """One session from hello to its end; returns why it ended."""
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(session_pb2.SessionRequest(hello=session_pb2.Hello(peer=self._peer)))
        stream = session_pb2_grpc.SessionServiceStub(engine).Session(wait_for_ready=True)
        stub = engine_pb2_grpc.EngineServiceStub(engine)
        parts = (
            self._read(stream, stub),
            _write(stream, self._outgoing),
            self._watches.watch_cache(stub),
            self._watches.watch_load(stub),
            self._watch_progress(),
            self._watch_certificates(renewal),
        )
        tasks = [asyncio.create_task(part, name=f"engine {self._endpoint.address}") for part in parts]
        try:
            # Not the first that ends: the writer may notice before the reader that the stream is over.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        except LostError as lost:
            return lost
        finally:
            stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise RuntimeError("the session ended without a reason: its reader and watches only end by raising one")

    async def _read(self, stream: _Stream, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        while True:
            response: session_pb2.SessionResponse = await next_message(stream)
            match response.WhichOneof("frame"):
                case "step" if self._connected:
                    updates = [self._update(update) for update in response.step.updates]
                    self._router.engine_stepped(self._endpoint, updates)
                case "welcome" if not self._connected:
                    await self._welcomed(response.welcome, stub)
                case "draining" if self._connected:
                    logger.info("engine drains", extra={"engine": self._endpoint.name})
                    self._router.engine_draining(self._endpoint)
                case frame:
                    raise BrokenContractError(f"it sent an unexpected frame: {frame}")

    async def _welcomed(self, welcome: session_pb2.Welcome, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        status = await outcome(stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT))
        if status.page_size != PAGE_SIZE:
            raise BrokenContractError(
                f"its pages hold {status.page_size} tokens, this router's {PAGE_SIZE}: run one version of both"
            )
        self._connected = True
        name = welcome.server or self._endpoint.address
        self._router.engine_connected(
            self._endpoint, self, name=name, model=welcome.model, max_num_seqs=status.max_num_seqs
        )
        facts = {"engine": name, "address": self._endpoint.address, "model": welcome.model}
        logger.info("session with engine", extra=facts)

    async def _watch_progress(self) -> NoReturn:
        """Raises StalledError when the engine does nothing although it has work."""
        await until_stalled(self._endpoint.idle_seconds, self._endpoint.progressed, self._stall_timeout)
        self._endpoint.stall()
        raise StalledError(f"it has done nothing for {self._stall_timeout:g} s although it has work")

    async def _watch_certificates(self, renewal: asyncio.Event) -> None:
        """Raises CallEndedError when the channel can't connect with what it knows, and there are new certificates."""
        await renewal.wait()
        if not self._connected:
            raise CallEndedError("there are new certificates to connect with")

    def _update(self, message: session_pb2.RequestUpdate) -> Update:
        """The update; one that makes no sense ends its request here and at the engine."""
        try:
            return update_from_proto(message)
        except InternalError as error:
            self.cancel(message.key)
            return Update(message.key, finished=Finished(FinishReason.ERROR, error))

    def _tell(self, lost: LostError, level: int) -> None:
        reason = str(lost)
        news = "lost engine: %s" if self._connected else "engine is not there yet: %s"
        facts = {"engine": self._endpoint.name, "in_flight": len(self._endpoint.flights)}
        logger.log(logging.DEBUG if reason in self._told else level, news, reason, extra=facts)
        self._told.add(reason)


async def _write(stream: _Stream, outgoing: _Outgoing) -> None:
    """Sends what is put there until the stream ends; the reader sees that too, and why.

    gRPC would do this with an iterator of requests, but lets go of the iterator's task when the engine ends the call.
    """
    while True:
        message = await outgoing.get()
        try:
            await stream.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return

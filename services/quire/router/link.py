"""The gRPC client of one engine: its session and the watches of its cache and load, for as long as the router lives.

The session decides: while it stands the engine is connected, when it ends everything known of the engine is void. The
watches live inside it; one that breaks alone is opened again, and its first message makes up for what was missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from typing import TypeVar

import grpc

from quire.router.core import Router
from quire.router.endpoint import Endpoint, Load, Phase
from quire.router.metrics import RouterMetrics
from quire.service.errors import InternalError
from quire.service.grpc_server import channel
from quire.service.pages import HASH_BYTES, PAGE_SIZE
from quire.service.request import Finished, FinishReason, Request, Update
from quire.service.wire import request_to_proto, update_from_proto
from quire.v1 import engine_pb2, engine_pb2_grpc, session_pb2, session_pb2_grpc

# Seconds between attempts with an engine that answers but refuses, as it does while it loads; one that isn't there at
# all is the channel's affair, which has its own backoff.
_FIRST_RETRY, _LAST_RETRY = 0.1, 1.0

_CALL_TIMEOUT = 10.0

_M = TypeVar("_M")
_SessionCall = grpc.aio.StreamStreamCall[session_pb2.SessionRequest, session_pb2.SessionResponse]

logger = logging.getLogger(__name__)


class _CallEndedError(Exception):
    """A call to the engine is over; the message says why."""


class _BrokenContractError(_CallEndedError):
    """The engine does not keep to the contract: no use in calling it again for the same."""


class EngineLink:
    """Keeps one endpoint connected. `peer` names this router in the engine's log; `load_interval` is in seconds."""

    def __init__(
        self, endpoint: Endpoint, router: Router, metrics: RouterMetrics, *, peer: str, load_interval: float
    ) -> None:
        self._endpoint = endpoint
        self._router = router
        self._metrics = metrics
        self._peer = peer
        self._load_interval_ms = round(load_interval * 1000)
        self._outgoing: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._connected = False

    def submit(self, key: int, request: Request) -> None:
        """Sends a request under a key of its own."""
        submit = session_pb2.Submit(key=key, request=request_to_proto(request))
        self._outgoing.put_nowait(session_pb2.SessionRequest(submit=submit))

    def cancel(self, key: int) -> None:
        """Takes it back."""
        self._outgoing.put_nowait(session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=key)))

    async def run(self) -> None:
        """Connects and reconnects until it is cancelled."""
        async with channel(self._endpoint.address) as engine:
            delay, last_reason = _FIRST_RETRY, ""
            while True:
                reason = await self._session(engine)
                if self._connected:
                    delay, last_reason = _FIRST_RETRY, ""
                    facts = {"engine": self._endpoint.name, "in_flight": len(self._endpoint.flights)}
                    logger.warning("lost engine: %s", reason, extra=facts)
                elif reason != last_reason:
                    last_reason = reason
                    logger.info("engine is not there yet: %s", reason, extra={"engine": self._endpoint.address})
                self._connected = False
                self._router.engine_lost(self._endpoint, reason)
                await self._sweep()
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LAST_RETRY)

    async def _session(self, engine: grpc.aio.Channel) -> str:
        """One session from hello to its end; returns why it ended."""
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(session_pb2.SessionRequest(hello=session_pb2.Hello(peer=self._peer)))
        stream = session_pb2_grpc.SessionServiceStub(engine).Session(_drained(self._outgoing), wait_for_ready=True)
        stub = engine_pb2_grpc.EngineServiceStub(engine)
        parts = (self._read(stream, stub), self._watch_cache(stub), self._watch_load(stub))
        tasks = [asyncio.create_task(part, name=f"engine {self._endpoint.address}") for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except _CallEndedError as lost:
            return str(lost)
        finally:
            stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise RuntimeError("a part of the session returned: each ends by raising why")

    async def _read(self, stream: _SessionCall, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        async for response in _messages(stream):
            match response.WhichOneof("frame"):
                case "step" if self._connected:
                    updates = [_update(update) for update in response.step.updates]
                    self._router.engine_stepped(self._endpoint, updates)
                case "welcome" if not self._connected:
                    await self._welcomed(response.welcome, stub)
                case "draining" if self._connected:
                    logger.info("engine drains", extra={"engine": self._endpoint.name})
                    self._router.engine_draining(self._endpoint)
                case frame:
                    raise _BrokenContractError(f"it sent an unexpected frame: {frame}")

    async def _welcomed(self, welcome: session_pb2.Welcome, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        status = await _answer(stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT))
        if status.page_size != PAGE_SIZE:
            raise _BrokenContractError(
                f"its pages hold {status.page_size} tokens, this router's {PAGE_SIZE}: run one version of both"
            )
        self._connected = True
        name = welcome.server or self._endpoint.address
        self._router.engine_connected(
            self._endpoint, self, name=name, model=welcome.model, max_num_seqs=status.max_num_seqs
        )
        facts = {"engine": name, "address": self._endpoint.address, "model": welcome.model}
        logger.info("session with engine", extra=facts)

    async def _watch_cache(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        while True:
            watch = stub.WatchCache(engine_pb2.WatchCacheRequest(), wait_for_ready=True)
            try:
                async for event in _messages(watch):
                    if not await self._apply(event):
                        self._metrics.cache_gap(self._endpoint)
                        logger.warning("cache events are missing: subscribing again", extra=self._facts(event))
                        break
            except _BrokenContractError:
                raise
            except _CallEndedError as lost:
                logger.debug("lost the watch of the cache: %s", lost, extra={"engine": self._endpoint.name})
            finally:
                watch.cancel()
            await asyncio.sleep(_FIRST_RETRY)

    async def _apply(self, event: engine_pb2.WatchCacheResponse) -> bool:
        cache = self._endpoint.cache
        match event.WhichOneof("event"):
            case "snapshot":
                for _ in cache.snapshot(event.epoch, event.sequence, _hashes(event.snapshot.stored)):
                    await asyncio.sleep(0)
                await self._sweep()
            case "delta":
                stored, removed = _hashes(event.delta.stored), _hashes(event.delta.removed)
                if not cache.delta(event.epoch, event.sequence, stored, removed):
                    return False
            case kind:
                raise _BrokenContractError(f"it sent a cache event that holds {kind}")
        self._metrics.cache_event(self._endpoint)
        return True

    async def _watch_load(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        request = engine_pb2.WatchLoadRequest(interval_ms=self._load_interval_ms)
        while True:
            watch = stub.WatchLoad(request, wait_for_ready=True)
            try:
                async for report in _messages(watch):
                    self._router.engine_reported(self._endpoint, _load(report))
            except _BrokenContractError:
                raise
            except _CallEndedError as lost:
                logger.debug("lost the watch of the load: %s", lost, extra={"engine": self._endpoint.name})
            finally:
                watch.cancel()
            await asyncio.sleep(_FIRST_RETRY)

    async def _sweep(self) -> None:
        """Cleans the index up after what has just been retired, without holding up the tokens in flight."""
        for _ in self._router.fleet.index.sweep():
            await asyncio.sleep(0)

    def _facts(self, event: engine_pb2.WatchCacheResponse) -> dict[str, object]:
        cache = self._endpoint.cache
        return {"engine": self._endpoint.name, "epoch": event.epoch, "sequence": event.sequence, "had": cache.sequence}


async def _messages(call: AsyncIterable[_M]) -> AsyncIterator[_M]:
    """The call's messages; raises _CallEndedError at its end, however it ends."""
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise _CallEndedError(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError:
        _raise_if_cancelled()
        raise _CallEndedError("CANCELLED: by the engine") from None
    raise _CallEndedError("it ended the call")


async def _answer(call: Awaitable[_M]) -> _M:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise _CallEndedError(f"{error.code().name}: {error.details()}") from error
    except asyncio.CancelledError:
        _raise_if_cancelled()
        raise _CallEndedError("CANCELLED: by the engine") from None


def _raise_if_cancelled() -> None:
    """gRPC raises CancelledError when the peer ended a call with that status, too; this task goes on then."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError


def _update(message: session_pb2.RequestUpdate) -> Update:
    try:
        return update_from_proto(message)
    except InternalError as error:
        return Update(message.key, tuple(message.token_ids), finished=Finished(FinishReason.ERROR, error))


def _load(report: engine_pb2.WatchLoadResponse) -> Load:
    try:
        phase = Phase(engine_pb2.EnginePhase.Name(report.phase).removeprefix("ENGINE_PHASE_"))
    except ValueError:
        raise _BrokenContractError(f"it reported the phase {report.phase}: run one version of both") from None
    return Load(
        running=report.running,
        waiting=report.waiting,
        pending_prefill_tokens=report.pending_prefill_tokens,
        pages_total=report.pages_total,
        pages_available=report.pages_available,
        prefill_tokens_per_second=report.prefill_tokens_per_second,
        decode_step_seconds=report.decode_step_seconds,
        phase=phase,
    )


def _hashes(concatenated: bytes) -> bytes:
    if len(concatenated) % HASH_BYTES:
        raise _BrokenContractError(f"it sent page hashes of {len(concatenated)} bytes: each has {HASH_BYTES}")
    return concatenated


async def _drained(queue: asyncio.Queue[session_pb2.SessionRequest]) -> AsyncIterator[session_pb2.SessionRequest]:
    while True:
        yield await queue.get()

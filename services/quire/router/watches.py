"""The watches of one engine's cache and load, which keep its part of the index and its load up to date.

`link.EngineLink` runs them for as long as a session stands. One that breaks alone is opened again, and its first
message makes up for what was missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from quire.router.calls import BrokenContractError, CallEndedError, ResponseStream, next_message
from quire.router.core import Router
from quire.router.endpoint import Endpoint, Load, Phase
from quire.router.metrics import RouterMetrics
from quire.service.pages import HASH_BYTES
from quire.v1 import engine_pb2, engine_pb2_grpc

# Seconds between attempts.
_FIRST_RETRY, _LAST_RETRY = 0.1, 1.0

M = TypeVar("M")

logger = logging.getLogger(__name__)


class EngineWatches:
    """Both watches of one endpoint. They end only by being cancelled or with BrokenContractError."""

    def __init__(self, endpoint: Endpoint, router: Router, metrics: RouterMetrics, *, load_interval: float) -> None:
        self._endpoint = endpoint
        self._router = router
        self._metrics = metrics
        self._load_interval_ms = round(load_interval * 1000)

    async def watch_cache(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> NoReturn:
        """Applies the engine's cache events; subscribes again when one is missing."""
        request = engine_pb2.WatchCacheRequest()
        await self._watch("cache", lambda: stub.WatchCache(request, wait_for_ready=True), self._apply)

    async def watch_load(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> NoReturn:
        """Takes the engine's load reports."""
        request = engine_pb2.WatchLoadRequest(interval_ms=self._load_interval_ms)
        await self._watch("load", lambda: stub.WatchLoad(request, wait_for_ready=True), self._report)

    async def sweep(self) -> None:
        """Cleans the index up after what has just been retired, without holding up the tokens in flight."""
        for _ in self._router.fleet.index.sweep():
            await asyncio.sleep(0)

    async def _watch(
        self, what: str, subscribe: Callable[[], ResponseStream[M]], take: Callable[[M], Awaitable[bool]]
    ) -> NoReturn:
        delay, last_reason = _FIRST_RETRY, ""
        while True:
            call = subscribe()
            answered = False
            try:
                while await take(await next_message(call)):
                    answered = True
            except CallEndedError as ended:
                reason = str(ended)
                # One that worked ends with its engine, of which the session tells. One that is refused is news once.
                level = logging.DEBUG if answered or reason == last_reason else logging.WARNING
                logger.log(level, "no watch of the %s: %s", what, reason, extra={"engine": self._endpoint.name})
                last_reason = reason
            finally:
                call.cancel()
            delay = _FIRST_RETRY if answered else min(delay * 2, _LAST_RETRY)
            await asyncio.sleep(delay)

    async def _apply(self, event: engine_pb2.WatchCacheResponse) -> bool:
        """False if events before this one are missing."""
        cache = self._endpoint.cache
        match event.WhichOneof("event"):
            case "snapshot":
                for _ in cache.snapshot(event.epoch, event.sequence, _hashes(event.snapshot.stored)):
                    await asyncio.sleep(0)
                await self.sweep()
            case "delta":
                had = cache.sequence
                stored, removed = _hashes(event.delta.stored), _hashes(event.delta.removed)
                if not cache.delta(event.epoch, event.sequence, stored, removed):
                    self._metrics.cache_gap(self._endpoint)
                    facts = {"engine": self._endpoint.name, "epoch": event.epoch, "sequence": event.sequence}
                    logger.warning("cache events are missing: subscribing again", extra={**facts, "had": had})
                    return False
            case kind:
                raise BrokenContractError(f"it sent a cache event that holds {kind}")
        self._metrics.cache_event(self._endpoint)
        return True

    async def _report(self, report: engine_pb2.WatchLoadResponse) -> bool:
        self._router.engine_reported(self._endpoint, _load(report))
        return True


def _hashes(concatenated: bytes) -> bytes:
    if len(concatenated) % HASH_BYTES:
        raise BrokenContractError(f"it sent page hashes of {len(concatenated)} bytes: each has {HASH_BYTES}")
    return concatenated


def _load(report: engine_pb2.WatchLoadResponse) -> Load:
    try:
        phase = Phase(engine_pb2.EnginePhase.Name(report.phase).removeprefix("ENGINE_PHASE_"))
    except ValueError:
        raise BrokenContractError(f"it reported the phase {report.phase}: run one version of both") from None
    return Load(
        running=report.running,
        waiting=report.waiting,
        pending_prefill_tokens=report.pending_prefill_tokens,
        pages_total=report.pages_total,
        pages_available=report.pages_available,
        prefill_tokens_per_second=report.prefill_tokens_per_second,
        decode_step_seconds=report.decode_step_seconds,
        decode_tokens_per_step=report.decode_tokens_per_step,
        phase=phase,
        steps=report.steps,
        cache_sequence=report.cache_sequence,
    )

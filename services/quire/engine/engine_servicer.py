"""What an engine is asked beside the tokens: its cache, its load, its status, its drain, a look inside.

Routers, the operator and `quire top` ask. Translates; `hub` and the core do the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from quire.engine.hub import Hub
from quire.engine.phase import Phase, PhaseState
from quire.engine.wire import page_map_to_proto, sequence_to_proto, stats_to_proto
from quire.service.errors import InvalidRequestError, QuireError, UnavailableError
from quire.service.grpc_server import abort
from quire.service.pages import PAGE_SIZE
from quire.v1 import engine_pb2, engine_pb2_grpc

MAX_CELLS = 65536
MAX_SEQUENCES = 4096


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """What routers and the operator ask beside the tokens."""

    def __init__(self, name: str, phase: PhaseState, hub: Hub) -> None:
        self._name = name
        self._phase = phase
        self._hub = hub

    async def WatchCache(  # noqa: N802
        self,
        request: engine_pb2.WatchCacheRequest,
        context: grpc.aio.ServicerContext[engine_pb2.WatchCacheRequest, engine_pb2.WatchCacheResponse],
    ) -> AsyncIterator[engine_pb2.WatchCacheResponse]:
        """A snapshot, then each change; ends with UNAVAILABLE if the subscriber falls too far behind."""
        feed = self._hub.subscribe()
        try:
            while (event := await feed.next()) is not None:
                response = engine_pb2.WatchCacheResponse(epoch=self._hub.epoch, sequence=event.sequence)
                if event.snapshot:
                    response.snapshot.stored = b"".join(event.stored)
                else:
                    response.delta.stored = b"".join(event.stored)
                    response.delta.removed = b"".join(event.removed)
                yield response
        finally:
            self._hub.unsubscribe(feed)
        await abort(context, UnavailableError("the subscriber fell behind: subscribe again for a snapshot"))

    async def WatchLoad(  # noqa: N802
        self,
        request: engine_pb2.WatchLoadRequest,
        context: grpc.aio.ServicerContext[engine_pb2.WatchLoadRequest, engine_pb2.WatchLoadResponse],
    ) -> AsyncIterator[engine_pb2.WatchLoadResponse]:
        """The load at once, then whenever it changed, at most once per interval."""
        if not request.HasField("interval_ms"):
            await abort(context, InvalidRequestError("interval_ms is missing: set it", field="interval_ms"))
        loop = asyncio.get_running_loop()
        while True:
            sent, reported_at = self._report(), loop.time()
            yield sent
            async with self._hub.load_changed:
                while self._report() == sent:
                    await self._hub.load_changed.wait()
            # Not a wait for something to happen, but the interval that the subscriber asked for.
            await asyncio.sleep(max(0.0, reported_at + request.interval_ms / 1000 - loop.time()))

    async def GetStatus(  # noqa: N802
        self,
        request: engine_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[engine_pb2.GetStatusRequest, engine_pb2.GetStatusResponse],
    ) -> engine_pb2.GetStatusResponse:
        """The phase and what is served."""
        return self._status()

    async def Inspect(  # noqa: N802
        self,
        request: engine_pb2.InspectRequest,
        context: grpc.aio.ServicerContext[engine_pb2.InspectRequest, engine_pb2.InspectResponse],
    ) -> engine_pb2.InspectResponse:
        """What the core holds, once its step is over; the status alone if it does not step."""
        try:
            _check_limits(request)
            if self._phase.phase not in (Phase.READY, Phase.DRAINING):
                return engine_pb2.InspectResponse(status=self._status())
            inspection = await self._hub.inspect(request.max_cells, request.max_sequences)
        except QuireError as error:
            await abort(context, error)
        # Status and stats are taken after the core has answered, so that all of it is of one moment.
        return engine_pb2.InspectResponse(
            status=self._status(),
            stats=stats_to_proto(self._hub.load) if self._hub.load is not None else None,
            pages=page_map_to_proto(inspection.pages),
            sequences=map(sequence_to_proto, inspection.sequences),
        )

    async def Drain(  # noqa: N802
        self,
        request: engine_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[engine_pb2.DrainRequest, engine_pb2.DrainResponse],
    ) -> engine_pb2.DrainResponse:
        """Stops taking requests and answers when those in flight are done or cut off."""
        if not request.HasField("grace_ms"):
            await abort(context, InvalidRequestError("grace_ms is missing: set it", field="grace_ms"))
        return engine_pb2.DrainResponse(cut_off=await drain(self._phase, self._hub, request.grace_ms / 1000))

    def _status(self) -> engine_pb2.GetStatusResponse:
        response = engine_pb2.GetStatusResponse(
            engine=self._name,
            phase=_phase_to_proto(self._phase.phase),
            activity=self._phase.activity,
            progress=self._phase.progress,
            epoch=self._hub.epoch,
            page_size=PAGE_SIZE,
            load=self._report(),
            failure=self._phase.failure,
        )
        if (ready := self._hub.ready) is not None:
            response.model = ready.model
            response.device, response.dtype = ready.device.device, ready.device.dtype
            response.max_model_len, response.max_num_seqs = ready.max_model_len, ready.max_num_seqs
        return response

    def _report(self) -> engine_pb2.WatchLoadResponse:
        report = engine_pb2.WatchLoadResponse(
            phase=_phase_to_proto(self._phase.phase), cache_sequence=self._hub.cache_sequence
        )
        if (load := self._hub.load) is not None:
            report.running, report.waiting = load.running, load.waiting
            report.pending_prefill_tokens = load.pending_prefill_tokens
            report.pages_total, report.pages_available = load.pages_total, load.pages_available
            report.prefill_tokens_per_second = load.stats.prefill_tokens_per_second
            report.decode_step_seconds = load.stats.decode_step_seconds
            report.decode_tokens_per_step = load.stats.decode_tokens_per_step
            report.steps = load.stats.steps
        return report


async def drain(phase: PhaseState, hub: Hub, grace_s: float) -> int:
    """Ends the engine's work in order; returns how many requests the end of the grace period cut off."""
    phase.advance(Phase.DRAINING)
    await hub.notify()
    try:
        await asyncio.wait_for(hub.until_idle(), grace_s)
    except TimeoutError:
        return hub.cut_off()
    return 0


def _check_limits(request: engine_pb2.InspectRequest) -> None:
    for name, given, value, least, most in (
        ("max_cells", request.HasField("max_cells"), request.max_cells, 1, MAX_CELLS),
        ("max_sequences", request.HasField("max_sequences"), request.max_sequences, 0, MAX_SEQUENCES),
    ):
        if not given:
            raise InvalidRequestError(f"{name} is missing: set it", field=name)
        if not least <= value <= most:
            raise InvalidRequestError(f"{name} is {value}: it must lie in [{least}, {most}]", field=name)


def _phase_to_proto(phase: Phase) -> engine_pb2.EnginePhase.ValueType:
    return engine_pb2.EnginePhase.Value(f"ENGINE_PHASE_{phase.name}")

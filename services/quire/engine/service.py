"""The engine service as a whole: the gRPC server around one core process, from start to drain."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict

from quire.engine.config import EngineConfig
from quire.engine.core_client import CoreClient
from quire.engine.engine_servicer import EngineServicer, drain
from quire.engine.hub import Hub
from quire.engine.messages import Compiling, Failed, Inspected, Load, Loading, Ready, StartCore, Stepped
from quire.engine.metrics import EngineMetrics
from quire.engine.phase import Phase, PhaseState
from quire.engine.server import SessionServicer
from quire.engine.sidecar_client import SidecarClient
from quire.service.errors import ConfigError, InternalError, UnavailableError
from quire.service.grpc_server import GrpcServer
from quire.service.stalls import until_stalled
from quire.service.tls import Tls
from quire.service.tracing import Tracing
from quire.v1 import engine_pb2_grpc, session_pb2_grpc

logger = logging.getLogger(__name__)


class EngineService:
    """Listens at once, so that status can tell of the loading; health is SERVING while requests are taken."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._phase = PhaseState()
        self._tracing = Tracing("engine", config.name)
        self._metrics = EngineMetrics(config.name)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then drains.

        Raises ConfigError if the core can't load, InternalError if it dies, fails or hangs after that.
        """
        config = self._config
        tls = None if config.tls is None else Tls(config.tls, self._metrics.certificate_reloaded)
        core = await CoreClient.start(StartCore(config.core, config.name, config.log_level, config.log_format))
        # Nanoseconds of the wall clock: later starts have other, larger epochs.
        hub = Hub(core.send, epoch=time.time_ns())
        self._metrics.observe(hub.silent_seconds)
        sidecar = SidecarClient(config.core.sidecar, config.core.sidecar_deadline_s) if config.core.sidecar else None
        server = GrpcServer(config.listen, credentials=None if tls is None else tls.grpc_credentials())
        session = SessionServicer(config.name, self._phase, hub, sidecar, self._tracing.tracer)
        server.add("quire.v1.SessionService", session_pb2_grpc.add_SessionServiceServicer_to_server, session)
        engine = EngineServicer(config.name, self._phase, hub)
        server.add("quire.v1.EngineService", engine_pb2_grpc.add_EngineServiceServicer_to_server, engine)
        renewing = None if tls is None else asyncio.create_task(tls.files.watch(config.reload_interval))
        try:
            await server.start()
            self._metrics.serve(config.metrics_port)
            failed = asyncio.create_task(self._until_failed(core, hub, server))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait((failed, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and self._phase.phase is Phase.READY:
                await self._drain(hub, server, failed)
            stopped.cancel()
            if self._phase.phase is Phase.FAILED:
                raise (ConfigError if hub.ready is None else InternalError)(self._phase.failure)
        finally:
            if renewing is not None:
                renewing.cancel()
            await core.close()
            await server.stop(grace=1.0)
            if sidecar is not None:
                await sidecar.close()
            self._tracing.close()

    async def _drain(self, hub: Hub, server: GrpcServer, failed: asyncio.Task[None]) -> None:
        await server.set_serving(False)
        draining = asyncio.create_task(drain(self._phase, hub, self._config.grace_s))
        await asyncio.wait((draining, failed), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()

    async def _until_failed(self, core: CoreClient, hub: Hub, server: GrpcServer) -> None:
        """Follows the core until it ends or hangs, which it should not while the service runs; then nothing waits."""
        timeout = self._config.step_timeout_s
        following = asyncio.create_task(self._follow(core, hub, server))
        hanging = asyncio.create_task(until_stalled(hub.silent_seconds, hub.progressed, timeout))
        await asyncio.wait((following, hanging), return_when=asyncio.FIRST_COMPLETED)
        failure = "the engine's core process died: see the log above"
        if not following.done():
            failure = f"no step has ended for {timeout:g} s although there is work: the core hangs"
            logger.error("the core hangs: it is killed", extra={"in_flight": hub.in_flight, "seconds": timeout})
            # It may be in the kernel's hands and not die: nobody waits for that.
            core.kill()
        following.cancel()
        hanging.cancel()
        self._phase.advance(Phase.FAILED, failure=failure)
        await server.set_serving(False)
        await hub.notify()
        hub.fail_all(UnavailableError("the engine failed: send the request to another"))

    async def _follow(self, core: CoreClient, hub: Hub, server: GrpcServer) -> None:
        """Takes the core's messages until it has failed or ended."""
        async for message in core.messages():
            hub.progressed()
            match message:
                case Stepped():
                    self._metrics.record(message)
                    await hub.stepped(message)
                case Inspected():
                    hub.inspected(message)
                case Loading(activity, progress):
                    self._phase.activity, self._phase.progress = activity, progress
                case Ready():
                    hub.ready, hub.load = message, Load.at_start(message)
                    self._phase.model, self._phase.progress = message.model, 1.0
                    self._phase.advance(Phase.READY)
                    self._metrics.record_start(message)
                    await hub.notify()
                    await server.set_serving(True)
                    times = {f"{name}_s": round(seconds, 2) for name, seconds in message.start_seconds.items()}
                    facts = {"model": message.model, **asdict(message.device), "pages": message.num_pages, **times}
                    logger.info("ready", extra=facts)
                case Compiling():
                    pass
                case Failed(failure):
                    self._phase.advance(Phase.FAILED, failure=failure)
                    return

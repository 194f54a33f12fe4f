"""The router as a whole: its links to the engines and the server for gateways, from start to clean stop."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from quire.router.config import RouterConfig
from quire.router.core import Router
from quire.router.discovery import discovery_of
from quire.router.endpoint import Endpoint
from quire.router.link import EngineLink
from quire.router.links import EngineLinks
from quire.router.metrics import RouterMetrics
from quire.router.server import SERVICE, SessionServicer
from quire.service.errors import UnavailableError
from quire.service.grpc_server import GrpcServer
from quire.service.peer_tls import Dialer
from quire.service.reload import Reloaded
from quire.service.tls import Tls
from quire.service.tracing import Tracing
from quire.v1 import session_pb2_grpc

# After the grace period every request is told to end; the sessions get this long to send those events.
_LAST_WORDS_SECONDS = 2.0

# What is left then are watches of the health, which never end by themselves.
_STOP_SECONDS = 0.2

logger = logging.getLogger(__name__)


class RouterService:
    """One router in this process: `run` it until asked to stop; `address` is where it listens once `started` is set.

    `router` is its core, `metrics` what it counts.
    """

    def __init__(self, config: RouterConfig, tracing: Tracing | None = None) -> None:
        self.started = asyncio.Event()
        self.address = ""
        self._config = config
        self._tracing = tracing or Tracing("router", config.name)
        self.metrics = RouterMetrics()
        self.router = Router(
            hold=config.hold,
            max_moves=config.max_moves,
            retry_share=config.retry_share,
            tracer=self._tracing.tracer,
            metrics=self.metrics,
            ready_without_engines=config.ready_without_engines,
        )
        self._tls = None if config.tls is None else Tls(config.tls, partial(self.metrics.reloaded, "tls"))
        self._dialer = Dialer(config.engine_tls, partial(self.metrics.reloaded, "engine_tls"))
        credentials = None if self._tls is None else self._tls.grpc_credentials()
        self._server = GrpcServer(config.listen, credentials=credentials)
        self._servicer = SessionServicer(config.name, self.router, max_queued_updates=config.max_queued_updates)
        self._server.add(SERVICE, session_pb2_grpc.add_SessionServiceServicer_to_server, self._servicer)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set, then lets what is in flight finish.

        Raises ConfigError if it can't listen, or knows no way to find the engines.
        """
        config = self._config
        discovery = await discovery_of(config.engines, resolve_interval=config.resolve_interval)
        try:
            self.address = await self._server.start()
            self.metrics.serve(config.metrics_port)
            logger.info("router listens", extra={"address": self.address, "engines": ",".join(config.engines)})
            async with asyncio.TaskGroup() as group:
                links = EngineLinks(discovery, self.router, self.metrics, self._link_to)
                tasks = [
                    group.create_task(self._follow_changes(links), name="changes"),
                    group.create_task(links.run(), name="engines"),
                ]
                tasks += [group.create_task(files.watch(config.reload_interval)) for files in self._watched]
                self.started.set()
                await stop.wait()
                await self._drain()
                for task in tasks:
                    task.cancel()
        finally:
            await self._server.stop(_STOP_SECONDS)
            self._tracing.close()

    @property
    def _watched(self) -> list[Reloaded[Any]]:
        tls = None if self._tls is None else self._tls.files
        return [files for files in (tls, self._dialer.files) if files is not None]

    def _link_to(self, endpoint: Endpoint) -> EngineLink:
        config = self._config
        return EngineLink(
            endpoint,
            self.router,
            self.metrics,
            peer=config.name,
            load_interval=config.load_interval,
            stall_timeout=config.stall_timeout,
            dialer=self._dialer,
        )

    async def _drain(self) -> None:
        await self._server.set_serving(False)
        self.router.drain()
        try:
            await asyncio.wait_for(self.router.until_idle(), self._config.grace)
        except TimeoutError:
            error = UnavailableError("the router is shutting down: send the request to another")
            logger.warning("the grace period is over", extra={"cut_off": self.router.end_all(error)})
        await self._servicer.close(_LAST_WORDS_SECONDS)

    async def _follow_changes(self, links: EngineLinks) -> None:
        ready = False
        while True:
            await self.router.changed.wait()
            self.router.changed.clear()
            links.settle()
            if self.router.ready != ready:
                ready = self.router.ready
                await self._server.set_serving(ready)
                logger.info("ready" if ready else "not ready", extra={"engines": self.router.fleet.states})

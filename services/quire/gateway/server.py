"""The gateway as a whole: its model, its routers, HTTP and gRPC, from start to clean stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from quire.gateway.access.gate import Gate, GateLimits
from quire.gateway.access.grpc_access import Authentication
from quire.gateway.access.keys import KeyRing, load_keys
from quire.gateway.access.ledger import Ledger
from quire.gateway.access.metrics import AccessMetrics
from quire.gateway.config import GatewayConfig
from quire.gateway.connection import ConnectionLimits
from quire.gateway.core import Core
from quire.gateway.grpc_api import SERVICE, InferenceServicer
from quire.gateway.grpc_malformed import MalformedMessages
from quire.gateway.http import application
from quire.gateway.http_completions import HttpLimits
from quire.gateway.http_server import HttpServer
from quire.gateway.metrics import GatewayMetrics
from quire.gateway.model import ServedModel
from quire.gateway.observation import Observer
from quire.gateway.session import RouterSessions
from quire.gateway.worker_metrics import registry_of_all, share_values
from quire.gateway.workers import Worker
from quire.service.checkpoint import load_text, locate
from quire.service.errors import UnavailableError
from quire.service.grpc_server import GrpcServer
from quire.service.peer_tls import Dialer
from quire.service.reload import Reloaded
from quire.service.tls import Tls
from quire.service.tracing import Tracing
from quire.v1 import inference_pb2_grpc

# After the grace period every request is told to end; the servers get this long to send those answers.
_LAST_WORDS_SECONDS = 2.0

logger = logging.getLogger(__name__)


async def serve(config: GatewayConfig, stop: asyncio.Event, worker: Worker | None = None) -> None:
    """Runs a gateway until `stop` is set. Raises ConfigError if it can't start."""
    if worker is not None:
        share_values(worker)
    model = await asyncio.to_thread(load_model, config)
    tracing = Tracing("gateway", _instance())
    gateway = Gateway(config, model, tracing, worker)
    try:
        await gateway.start()
        if worker is not None:
            await worker.report(url=gateway.url, grpc=gateway.grpc_address)
        await gateway.run(stop)
    finally:
        await gateway.close()
        tracing.close()


def load_model(config: GatewayConfig) -> ServedModel:
    """The text side of the model that `config` names. Raises ModelError."""
    checkpoint = locate(config.model, text_only=True)
    names = config.served_model_names or (checkpoint.name,)
    return ServedModel(
        names, load_text(checkpoint), max_model_len=config.max_model_len, tool_format=config.tool_call_format
    )


class Gateway:
    """One gateway in this process: `start`, `run` until asked to stop, `close`."""

    def __init__(
        self, config: GatewayConfig, model: ServedModel, tracing: Tracing, worker: Worker | None = None
    ) -> None:
        self._config = config
        self._worker = worker
        self._changed = asyncio.Event()
        registry = CollectorRegistry()
        access_metrics = AccessMetrics(registry)
        self._dialer = Dialer(config.router_tls, partial(access_metrics.reloaded, "router_tls"))
        self._sessions = RouterSessions(
            config.routers,
            peer=_instance(),
            model=model.name,
            end_token_ids=model.end_token_ids,
            router_timeout=config.router_timeout,
            changed=self._changed.set,
            dialer=self._dialer,
        )
        core = Core(model, self._sessions)
        shown = registry if worker is None else registry_of_all(worker)
        observer = Observer(tracing.tracer, GatewayMetrics(registry), log_prompts=config.log_prompts)
        self._keys = _load_keys(config, access_metrics)
        self._ledger = Ledger() if worker is None else Ledger(worker.ledger, worker.index)
        limits = GateLimits(max_requests=config.max_requests, max_choices=config.max_choices)
        gate = Gate(self._keys, self._ledger, limits, access_metrics)
        http_limits = HttpLimits(config.max_body_bytes, config.read_timeout, config.request_timeout)
        app = application(core, observer, gate, shown, http_limits)
        self._model = model
        self._tls = Tls(config.tls, partial(access_metrics.reloaded, "tls")) if config.tls is not None else None
        self._http = HttpServer(
            app,
            config.host,
            config.port,
            stop_timeout=config.grace + _LAST_WORDS_SECONDS,
            limits=ConnectionLimits(
                config.max_header_bytes,
                config.read_timeout,
                config.write_timeout,
                partial(gate.reader_stalled, "http"),
            ),
            tls=self._tls.context() if self._tls is not None else None,
            reuse_port=worker is not None,
        )
        self._grpc = GrpcServer(
            config.grpc_listen,
            options=[
                # Only workers share a port; anybody else on it is a mistake.
                ("grpc.so_reuseport", int(worker is not None)),
                ("grpc.max_receive_message_length", config.max_body_bytes),
                ("grpc.max_metadata_size", config.max_header_bytes),
                ("grpc.absolute_max_metadata_size", config.max_header_bytes),
            ],
            interceptors=[Authentication(gate), MalformedMessages()],
            credentials=self._tls.grpc_credentials() if self._tls is not None else None,
        )
        self._grpc.add(
            SERVICE,
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            InferenceServicer(core, observer, gate, write_timeout=config.write_timeout),
        )
        self.url = ""
        self.grpc_address = ""

    async def start(self) -> None:
        """Listens and connects to the routers; `url` and `grpc_address` are set then. Raises ConfigError."""
        self.url = await self._http.start()
        self.grpc_address = await self._grpc.start()
        self._sessions.start()
        facts = {"url": self.url, "grpc": self.grpc_address, "model": self._model.name}
        logger.info("gateway listens" if self._worker is None else "worker listens", extra=facts)

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set; raises what made a part of the gateway fail before."""
        parts = [stop.wait(), self._http.ended(), self._sessions.failed(), self._report_readiness()]
        parts += [files.watch(self._config.reload_interval) for files in self._watched]
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def close(self) -> None:
        """Takes no more requests, lets those in flight finish within the grace period, ends the rest with an error."""
        self._http.begin_stop()
        ending = (
            asyncio.create_task(self._grpc.stop(self._config.grace + _LAST_WORDS_SECONDS)),
            asyncio.create_task(self._http.ended()),
        )
        _, late = await asyncio.wait(ending, timeout=self._config.grace)
        if late and self._sessions.in_flight:
            logger.warning("the grace period is over", extra={"in_flight": self._sessions.in_flight})
            self._sessions.end_all(UnavailableError("the gateway is shutting down: send the request to another one"))
        await asyncio.gather(*ending)
        await self._sessions.close()
        self._ledger.close()

    @property
    def _watched(self) -> list[Reloaded[Any]]:
        tls = None if self._tls is None else self._tls.files
        return [files for files in (self._keys, tls, self._dialer.files) if files is not None]

    async def _report_readiness(self) -> None:
        ready = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._sessions.ready != ready:
                ready = self._sessions.ready
                await self._grpc.set_serving(ready)
                logger.info("ready" if ready else "not ready", extra=self._sessions.states)


def _load_keys(config: GatewayConfig, metrics: AccessMetrics) -> Reloaded[KeyRing] | None:
    if not config.api_keys:
        return None

    def load() -> KeyRing:
        return load_keys(config.api_keys)

    return Reloaded("API keys", [config.api_keys], load, partial(metrics.reloaded, "api_keys"))


def _instance() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"

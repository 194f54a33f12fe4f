"""The sidecar as a process: tokenizer, server, metrics, in the order they start and stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server

from quire.service.errors import ConfigError
from quire.service.grpc_server import GrpcServer
from quire.service.tracing import Tracing
from quire.sidecar.config import SidecarConfig
from quire.sidecar.core import GrammarCore
from quire.sidecar.drafting_servicer import SERVICE as DRAFTING
from quire.sidecar.drafting_servicer import DraftingServicer
from quire.sidecar.metrics import SidecarMetrics
from quire.sidecar.server import SERVICE, GrammarServicer
from quire.v1 import drafting_pb2_grpc, grammar_pb2_grpc

logger = logging.getLogger(__name__)


async def serve(config: SidecarConfig, stop: asyncio.Event) -> None:
    """Runs the sidecar until `stop`. It listens, and health says SERVING, once the tokenizer is ready."""
    metrics = SidecarMetrics()
    core = await GrammarCore.load(config, metrics)
    tracing = Tracing("sidecar", config.name)
    server = GrpcServer(config.listen)
    try:
        server.add(
            SERVICE, grammar_pb2_grpc.add_GrammarServiceServicer_to_server, GrammarServicer(core, tracing.tracer)
        )
        server.add(
            DRAFTING,
            drafting_pb2_grpc.add_DraftingServiceServicer_to_server,
            DraftingServicer(config.drafting, metrics),
        )
        address = await server.start()
        with _metrics_server(config.metrics_port, metrics):
            await server.set_serving(True)
            logger.info("serving", extra={"address": address, "vocab_size": core.vocab_size})
            await stop.wait()
            logger.info("stopping")
    finally:
        await server.stop(grace=1.0)
        await core.close()
        tracing.close()


@contextmanager
def _metrics_server(port: int, metrics: SidecarMetrics) -> Iterator[None]:
    if not port:
        yield
        return
    try:
        server, thread = start_http_server(port, registry=metrics.registry)
    except OSError as error:
        raise ConfigError(
            f"can't serve metrics on port {port} ({error.strerror}): choose another --metrics-port",
            field="metrics_port",
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

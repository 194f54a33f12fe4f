"""Several gateway processes on one port: `--workers N`. The parent starts them again when they die, and stops them.

Each worker is a whole gateway with its own sessions to the routers; the kernel spreads new connections over them
(SO_REUSEPORT). They share a folder: the ledger of what API keys have used, the values of all workers' metrics, so that
whichever is scraped answers for all, and the socket on which they tell the parent that they listen.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.gateway.config import GatewayConfig
from quire.service.errors import ConfigError
from quire.service.supervisor import ChildDiedError, ChildSpec, Supervisor, Timing

_INDEX, _FOLDER = "QUIRE_GATEWAY_WORKER", "QUIRE_GATEWAY_FOLDER"
# prometheus_client's own.
_METRICS = "PROMETHEUS_MULTIPROC_DIR"

# For the servers' last words, beyond the grace period.
_STOP_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Worker:
    """Which of the workers this process is."""

    index: int
    folder: Path

    @property
    def ledger(self) -> str:
        """The file of `access.ledger`."""
        return str(self.folder / "ledger")

    @property
    def metrics(self) -> str:
        """The folder of all workers' metrics."""
        return str(self.folder / "metrics")

    async def report(self, *, url: str, grpc: str) -> None:
        """Tells the parent that this worker listens."""
        _, writer = await asyncio.open_unix_connection(str(self.folder / "workers.sock"))
        writer.write(f"{self.index} {url} {grpc}\n".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()


def this_worker() -> Worker | None:
    """None in a gateway of one process, and in the parent of several."""
    index = os.environ.get(_INDEX)
    return None if index is None else Worker(int(index), Path(os.environ[_FOLDER]))


async def run_workers(config: GatewayConfig, argv: Sequence[str], stop: asyncio.Event) -> None:
    """Keeps `config.workers` processes until `stop` is set. `argv` are the parent's flags.

    Raises ConfigError if the addresses are taken, or a worker can't start.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quire-gateway-")))
        (folder / "metrics").mkdir()
        port = _reserve(stack, config.host, config.port, "--port")
        grpc = _grpc_addresses(stack, config, folder)
        reports = [asyncio.Event() for _ in range(config.workers)]
        addresses: dict[int, tuple[str, str]] = {}

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            index, url, grpc = (await reader.readline()).decode().split()
            writer.close()
            addresses[int(index)] = (url, grpc)
            if not reports[int(index)].is_set():
                reports[int(index)].set()
                if len(addresses) == config.workers:
                    # Where gRPC listens on a socket of the file system, the first worker has the one that was named.
                    facts = {"url": addresses[0][0], "grpc": addresses[0][1], "workers": config.workers}
                    logger.info("gateway listens", extra=facts)

        def spec(index: int) -> ChildSpec:
            environment = {_INDEX: str(index), _FOLDER: str(folder), _METRICS: str(folder / "metrics")}
            flags = (*argv, f"--port={port}", f"--grpc-listen={grpc[index]}")
            command = (sys.executable, "-m", "quire.gateway", *flags)

            async def ready() -> None:
                await reports[index].wait()

            return ChildSpec(f"gateway-{index}", command, ready, environment)

        server = await asyncio.start_unix_server(hear, folder / "workers.sock")
        timing = Timing(stop=config.grace + _STOP_SECONDS)
        async with server, Supervisor([[spec(index) for index in range(config.workers)]], timing=timing) as supervisor:
            await _first(stop, _live(supervisor))


async def _live(supervisor: Supervisor) -> None:
    try:
        await supervisor.until_ready()
    except ChildDiedError as error:
        raise ConfigError(error.message) from error
    await supervisor.keep()


async def _first(stop: asyncio.Event, life: Coroutine[Any, Any, None]) -> None:
    living, stopping = asyncio.ensure_future(life), asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait((living, stopping), return_when=asyncio.FIRST_COMPLETED)
        if living in done:
            living.result()
    finally:
        living.cancel()
        stopping.cancel()
        await asyncio.gather(living, stopping, return_exceptions=True)


def _reserve(stack: ExitStack, host: str, port: int, flag: str) -> int:
    """A port that all workers will bind: it is held, without listening, as long as they live."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        holder = stack.enter_context(socket.socket(family, kind, protocol))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} {flag} {port} ({error.strerror or error}): choose an address of this machine and "
            "a free port"
        ) from error
    return int(holder.getsockname()[1])


def _grpc_addresses(stack: ExitStack, config: GatewayConfig, folder: Path) -> list[str]:
    """For each worker, in the form of --grpc-listen.

    One port for all; a unix socket can't be shared, so it is the first worker's, and the others have one each.
    """
    of_workers: list[list[str]] = [[] for _ in range(config.workers)]
    for place, address in enumerate(config.grpc_listen.split(",")):
        if address.startswith("unix:"):
            addresses = [address, *(f"unix:{folder}/grpc-{index}-{place}.sock" for index in range(1, config.workers))]
        else:
            host, _, port = address.rpartition(":")
            if not port.isdigit():
                raise ConfigError(f"--grpc-listen is {address}: give HOST:PORT or unix:PATH")
            port_of_all = _reserve(stack, host.strip("[]"), int(port), "--grpc-listen")
            addresses = [f"{host}:{port_of_all}"] * config.workers
        for of_worker, its in zip(of_workers, addresses, strict=True):
            of_worker.append(its)
    return [",".join(addresses) for addresses in of_workers]

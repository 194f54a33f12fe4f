"""Every service as a process of its own, several of each: what a test can kill, stop, drain and start again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from certificate_files import CertificateFiles
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import free_port

from quire.v1 import engine_pb2, engine_pb2_grpc

DEADLINE = 60.0


@dataclass
class Cluster:
    """One gateway, and as many routers and engines, each engine with its sidecar, as there are names.

    `folder` holds sockets and logs; `model` is what all serve, in float32. With `certificates` routers and engines are
    dialled over TCP, with mutual TLS. Engines have `engine_flags` besides.
    """

    folder: Path
    model: Path
    num_routers: int
    num_engines: int
    stall_timeout: float = 2.0
    certificates: CertificateFiles | None = None
    engine_flags: tuple[str, ...] = ()
    url: str = ""
    _ports: dict[str, int] = field(default_factory=dict)
    _flags: dict[str, list[str]] = field(default_factory=dict)
    _processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.routers = [f"router-{index}" for index in range(self.num_routers)]
        self.engines = [f"engine-{index}" for index in range(self.num_engines)]
        self.sidecars = [f"sidecar-{index}" for index in range(self.num_engines)]
        model = f"--model={self.model}"
        for name, sidecar in zip(self.engines, self.sidecars, strict=True):
            self._flags[sidecar] = ["quire.sidecar", model]
            self._flags[name] = [
                "quire.engine", model, "--dtype=float32", "--threads=1", "--grace=0.2",
                f"--sidecar={self.address(sidecar)}", "--kv-cache-bytes=8000000",
                *self.engine_flags,
            ]  # fmt: skip
        engines = ",".join(self.dialled(name) for name in self.engines)
        for name in self.routers:
            self._flags[name] = [
                "quire.router", f"--engines={engines}", "--hold=60", "--grace=0.2",
                f"--stall-timeout={self.stall_timeout}",
            ]  # fmt: skip
        routers = ",".join(self.dialled(name) for name in self.routers)
        self._flags["gateway"] = [
            "quire.gateway", model, f"--routers={routers}", f"--port={port}", "--router-timeout=60",
            f"--grpc-listen={self.address('gateway')}",
        ]  # fmt: skip
        if self.certificates is not None:
            for name in (*self.routers, *self.engines):
                self._flags[name] += [*self.certificates.flags("tls"), "--reload-interval=0.05"]
            for name in self.routers:
                self._flags[name] += self.certificates.flags("engine-tls")
            self._flags["gateway"] += [*self.certificates.flags("router-tls"), "--reload-interval=0.05"]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Cluster]:
        """All are ready when the block begins and gone when it ends."""
        try:
            await asyncio.gather(*(self.start(name) for name in self._flags))
            yield self
        finally:
            for name in self._processes:
                self.signal(name, signal.SIGKILL)
            await asyncio.gather(*(process.wait() for process in self._processes.values()))

    def address(self, name: str) -> str:
        """Where it listens, or is to listen."""
        return f"unix:{self.folder / name}.sock"

    def dialled(self, name: str) -> str:
        """Where its peers find it."""
        if self.certificates is None:
            return self.address(name)
        port = self._ports.setdefault(name, free_port())
        return f"127.0.0.1:{port}"

    def log(self, name: str) -> str:
        """What it has said in all its lives."""
        return (self.folder / f"{name}.log").read_text()

    async def start(self, name: str) -> None:
        """Starts it; returns when its health says that it serves."""
        module, *flags = self._flags[name]
        if name != "gateway":
            # The socket is plain, and there for our own look at its health.
            listen = self.address(name)
            if self.certificates is not None and name not in self.sidecars:
                listen = f"{self.dialled(name)},{listen}"
            flags = [*flags, f"--listen={listen}", f"--name={name}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, *flags,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        async with grpc.aio.insecure_channel(self.address(name)) as channel, asyncio.timeout(DEADLINE):
            stub = health_pb2_grpc.HealthStub(channel)
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return

    def signal(self, name: str, number: signal.Signals) -> None:
        """To it and to the processes that it started."""
        if self._processes[name].returncode is None:
            os.killpg(self._processes[name].pid, number)

    async def kill(self, name: str) -> None:
        """kill -9, and another life."""
        self.signal(name, signal.SIGKILL)
        await self._processes[name].wait()
        await self.start(name)

    async def drain(self, name: str) -> None:
        """SIGTERM, the end that it takes itself, and another life. Its exit status must be 0."""
        self._processes[name].send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE):
            status = await self._processes[name].wait()
        assert status == 0, f"{name} ended with {status}:\n{self.log(name)}"
        await self.start(name)

    def pid(self, name: str) -> int:
        """Of the process itself, not of those that it started."""
        return self._processes[name].pid

    async def ended(self, name: str) -> int:
        """Its exit status, once it has ended by itself."""
        return await asyncio.wait_for(self._processes[name].wait(), DEADLINE)

    async def freeze(self, name: str) -> None:
        """SIGSTOP for twice the time after which routers give it up, and SIGCONT."""
        self.signal(name, signal.SIGSTOP)
        await asyncio.sleep(2 * self.stall_timeout)  # nothing happens in it that could be waited for
        self.signal(name, signal.SIGCONT)

    async def until_idle(self) -> None:
        """Returns when no engine holds a request any more."""
        for name in self.engines:
            async with grpc.aio.insecure_channel(self.address(name)) as channel, asyncio.timeout(DEADLINE):
                watch = engine_pb2_grpc.EngineServiceStub(channel).WatchLoad(
                    engine_pb2.WatchLoadRequest(interval_ms=10)
                )
                async for load in watch:
                    if load.running == load.waiting == 0:
                        break

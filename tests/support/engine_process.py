"""An engine process on a Unix socket, and requests for the tiny model in it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from session_client import DEADLINE

from quire.service.grpc_server import channel
from quire.service.request import Request, SamplingParams, StopConditions
from quire.v1 import engine_pb2, engine_pb2_grpc

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Engine:
    address: str
    process: asyncio.subprocess.Process
    stub: engine_pb2_grpc.EngineServiceAsyncStub


@asynccontextmanager
async def engine(model: Path, socket: Path, *flags: str) -> AsyncIterator[Engine]:
    """`python -m quire.engine` on `socket`, ready when the block is entered."""
    address = f"unix:{socket}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "quire.engine", "--listen", address, "--model", str(model), "--dtype", "float32",
        "--threads", "1", *flags,
    )  # fmt: skip
    try:
        async with channel(address) as connection:
            stub = engine_pb2_grpc.EngineServiceStub(connection)
            await until_ready(stub)
            yield Engine(address, process, stub)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), DEADLINE)


async def until_ready(stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
    async with asyncio.timeout(DEADLINE):
        request = engine_pb2.WatchLoadRequest(interval_ms=20)
        async for load in stub.WatchLoad(request, wait_for_ready=True):
            if load.phase == engine_pb2.ENGINE_PHASE_READY:
                return


def prompt_of(length: int, seed: int = 1) -> list[int]:
    """Any prompt; another for each seed."""
    return [3 + (seed * 7919 + i * 104729) % 250 for i in range(length)]


def request(prompt: list[int], max_tokens: int = 8, **changes: object) -> Request:
    fields: dict[str, object] = {
        "request_id": "r", "model": "tiny", "prompt_token_ids": tuple(prompt), "sampling": GREEDY,
        "stop": StopConditions(max_tokens),
    }  # fmt: skip
    return Request(**(fields | changes))  # type: ignore[arg-type]


def core_of(server: int) -> int:
    """The core process of an engine."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    cores = [int(pid) for pid in children if b"core_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(cores) == 1
    return cores[0]

"""A core that hangs: it is stopped by a signal, which no more returns from a step than a kernel that never ends."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from engine_process import Engine, core_of, engine, prompt_of, request
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import until_ended
from served import free_port
from session_client import DEADLINE, SessionClient
from tiny_models import tiny_llama

from quire.engine.config import EngineConfig
from quire.engine.hub import Client, Hub
from quire.engine.messages import Compiling, Failed, FromCore
from quire.engine.service import EngineService
from quire.kernels import _triton
from quire.service.errors import ConfigError, ErrorCode, UnavailableError
from quire.service.grpc_server import GrpcServer, channel
from quire.service.request import FinishReason, Request, StopConditions, Update

STEP_TIMEOUT_S = 1.0
# Long enough not to end before their engine is stopped.
LONG = StopConditions(1500, ignore_eos=True)


def long_request() -> Request:
    return request(prompt_of(40), stop=LONG)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


async def until_not_serving(pod: Engine) -> None:
    async with channel(pod.address) as connection, asyncio.timeout(DEADLINE):
        async for answer in health_pb2_grpc.HealthStub(connection).Watch(health_pb2.HealthCheckRequest()):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                return


async def until_silent(port: int) -> float:
    """What Prometheus is told while a step hangs."""
    async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as http, asyncio.timeout(DEADLINE):
        while True:
            lines = (await http.get(f"http://127.0.0.1:{port}/metrics")).text.splitlines()
            seconds = next(float(line.split()[-1]) for line in lines if line.startswith("quire_engine_silent_seconds{"))
            if seconds > STEP_TIMEOUT_S / 4:
                return seconds


async def test_only_a_core_that_hangs_ends_its_engine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel that never ends would hold its requests and its GPU for good; one that was taken for it, because nobody
    asks it anything or because the whole machine stood still, would cost a start and every page it holds."""
    model, port = tmp_path / "tiny", free_port()
    tiny_llama(model, max_position_embeddings=4096)
    flags = ("--step-timeout", str(STEP_TIMEOUT_S))
    async with AsyncExitStack() as stack:
        hanging, idle, paused = await asyncio.gather(
            stack.enter_async_context(engine(model, tmp_path / "hanging", *flags, "--metrics-port", str(port))),
            stack.enter_async_context(engine(model, tmp_path / "idle", *flags)),
            stack.enter_async_context(engine(model, tmp_path / "paused", *flags)),
        )
        sessions = [await stack.enter_async_context(SessionClient(pod.address)) for pod in (hanging, idle, paused)]
        lost, kept = sessions[0].submit(long_request()), sessions[2].submit(long_request())
        await asyncio.gather(lost.until_tokens(3), kept.until_tokens(3))
        still = [core_of(idle.process.pid), paused.process.pid, core_of(paused.process.pid)]
        stack.callback(send, still, signal.SIGCONT)
        send(still, signal.SIGSTOP)
        core = core_of(hanging.process.pid)
        health = asyncio.create_task(until_not_serving(hanging))
        os.kill(core, signal.SIGSTOP)
        assert await until_silent(port) > 0

        finished = await lost.result()
        assert finished.error is not None and finished.error.code is ErrorCode.UNAVAILABLE
        assert lost.terminal_events == 1 and len(lost.token_ids) < LONG.max_tokens
        await health
        assert await asyncio.wait_for(hanging.process.wait(), DEADLINE) == 1
        until_ended([core])
        assert "no step has ended for 1 s although there is work: the core hangs" in capfd.readouterr().err

        # As much time has passed for the others, and nothing else.
        assert len(kept.token_ids) < LONG.max_tokens and kept.finished is None
        send(still, signal.SIGCONT)
        whole = sessions[1].submit(long_request())
        assert {(await stream.result()).reason for stream in (whole, kept)} == {FinishReason.LENGTH}
        assert kept.token_ids == whole.token_ids


class UndyingCore:
    """Stands for a core process that does not even end when it is killed, as in a broken driver."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[FromCore] = asyncio.Queue()
        self.killed = False

    async def messages(self) -> AsyncIterator[FromCore]:
        while True:
            yield await self.said.get()

    def kill(self) -> None:
        self.killed = True


@dataclass
class Watched:
    """A service around that core, with one request, until it has failed."""

    core: UndyingCore
    service: EngineService
    failed: asyncio.Task[None]
    heard: list[Update]

    @classmethod
    def start(cls, folder: Path, step_timeout_s: float) -> Watched:
        core, heard, hub = UndyingCore(), list[Update](), Hub(lambda message: None, epoch=1)
        service = EngineService(EngineConfig("unix:x", step_timeout_s=step_timeout_s))
        hub.submit(Client(heard.extend), 7, request([5]))
        failing = service._until_failed(core, hub, GrpcServer(f"unix:{folder / 's'}"))  # type: ignore[arg-type]
        return cls(core, service, asyncio.create_task(failing), heard)

    async def ended(self) -> str:
        """Why it has failed; its request has had its one end."""
        await asyncio.wait_for(self.failed, DEADLINE)
        (update,) = self.heard
        assert update.key == 7 and update.finished is not None and isinstance(update.finished.error, UnavailableError)
        return self.service._phase.failure


async def test_compiling_is_no_hang_and_nobody_waits_for_a_core_to_die(tmp_path: Path) -> None:
    """The first steps on a GPU compile for minutes, one kernel after the other; and what hangs in a driver takes no
    signal, but its requests have to go on elsewhere."""
    watched = Watched.start(tmp_path, 0.2)
    end = time.monotonic() + 3 * 0.2
    while time.monotonic() < end:
        watched.core.said.put_nowait(Compiling())
        await asyncio.sleep(0)
    assert not watched.failed.done() and not watched.heard
    assert "no step has ended for 0.2 s" in await watched.ended() and watched.core.killed


async def test_a_core_that_says_why_it_failed_need_not_end(tmp_path: Path) -> None:
    """After a kernel fault a process may hang in its driver on its way out, and its requests with it."""
    watched = Watched.start(tmp_path, 600)
    watched.core.said.put_nowait(Failed("a step failed: an illegal memory access"))
    assert await watched.ended() == "a step failed: an illegal memory access"


def test_each_compilation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that Triton does not call tells nothing, and one that answers yes leaves kernels uncompiled."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    told: list[Compiling] = []
    _triton.before_each_compilation(lambda: told.append(Compiling()))
    hook = triton.knobs.runtime.jit_cache_hook
    assert not hook(key="", repr="", fn=None, compile={}, is_manual_warmup=False, already_compiled=False)
    assert told == [Compiling()]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_step_timeout_must_be_a_time(seconds: str) -> None:
    """The engine would end at its first request."""
    with pytest.raises(ConfigError, match=f"--step-timeout is {seconds}: it must be above 0 seconds"):
        EngineConfig("unix:x", step_timeout_s=float(seconds))

"""The process: its flags, its start, its end while streams run, and what it tells of itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from router_testing import assert_whole, engines, gateway, holder_of, metric, prompt_of, request_of, router, until
from served import free_port
from session_client import SessionClient

from quire.router.__main__ import build_config, build_parser, main
from quire.router.config import RouterConfig
from quire.service.errors import ConfigError, ErrorCode
from quire.service.logs import LogFormat, setup_logging
from quire.service.request import TraceContext

LISTEN = ["--listen", "127.0.0.1:0"]


@pytest.fixture
def process_logging() -> Iterator[None]:
    """`main` sends the process's log to its standard error; the next test's is another."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def config_of(*argv: str) -> RouterConfig:
    return build_config(build_parser().parse_args(argv))


def test_flags_have_the_configs_defaults() -> None:
    """Without it the two places that give a default could drift apart."""
    assert config_of("--listen", "a:1", "--engines", "b:2") == RouterConfig("a:1", ("b:2",))


def test_flags() -> None:
    """Without it a flag could be parsed and lost."""
    argv = shlex.split(
        "--listen a:1 --engines b:2,c:3 --name r --hold 1 --ready-without-engines --max-moves 2 --retry-share 0.3 "
        "--stall-timeout 4 --resolve-interval 5 --grace 6 --load-interval 0.7 --max-queued-updates 8 --metrics-port 9"
    )
    assert config_of(*argv) == RouterConfig(
        listen="a:1",
        engines=("b:2", "c:3"),
        name="r",
        hold=1,
        ready_without_engines=True,
        max_moves=2,
        retry_share=0.3,
        stall_timeout=4,
        resolve_interval=5,
        grace=6,
        load_interval=0.7,
        max_queued_updates=8,
        metrics_port=9,
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--engines", ""],
        ["--engines", "a:1,"],
        ["--engines", "a:1,a:1"],
        ["--listen", ""],
        ["--name", ""],
        ["--hold", "-1"],
        ["--hold", "inf"],
        ["--hold", "nan"],
        ["--grace", "-1"],
        ["--max-moves", "-1"],
        ["--retry-share", "-0.1"],
        ["--retry-share", "nan"],
        ["--stall-timeout", "0"],
        ["--resolve-interval", "0"],
        ["--load-interval", "0"],
        ["--load-interval", "100"],
        ["--max-queued-updates", "0"],
        ["--metrics-port", "70000"],
    ],
)
def test_wrong_flags_are_named(argv: list[str]) -> None:
    """Without it a wrong flag would show only when an engine fails."""
    with pytest.raises(ConfigError, match=argv[0]):
        config_of("--listen", "a:1", "--engines", "b:2", *argv)


@pytest.mark.usefixtures("process_logging")
def test_a_start_that_can_not_succeed_ends_with_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that names the flag, not a traceback."""
    for argv, named in (
        ([*LISTEN, "--engines", "a:1", "--hold", "-1"], "--hold"),
        (["--listen", "unix:/no/such/folder/socket", "--engines", "a:1"], "/no/such/folder/socket"),
        ([*LISTEN, "--engines", "dns:engines"], "dns:NAME:PORT"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert named in error and "Traceback" not in error
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*LISTEN, "--engines", "kubernetes:models/engines:grpc"]) == 2
    assert "Kubernetes" in capsys.readouterr().err


class Process:
    """`python -m quire.router` and its log."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address
        self.lines: list[dict[str, object]] = []

    async def until_logged(self, message: str) -> dict[str, object]:
        """The next line with this message."""
        assert self.process.stderr is not None
        async with asyncio.timeout(30):
            while line := await self.process.stderr.readline():
                self.lines.append(json.loads(line))
                if self.lines[-1]["message"] == message:
                    return self.lines[-1]
        raise AssertionError(f"it never said {message}: {self.lines}")

    async def exit_status(self) -> int:
        async with asyncio.timeout(20):
            assert self.process.stderr is not None
            self.lines += [json.loads(line) for line in (await self.process.stderr.read()).splitlines()]
            return await self.process.wait()


@asynccontextmanager
async def process(fakes: list[FakeEngine], address: str, *flags: str) -> AsyncIterator[Process]:
    command = [sys.executable, "-m", "quire.router", "--listen", address, "--log-format", "json", *flags]
    running = await asyncio.create_subprocess_exec(
        *command, "--engines", ",".join(fake.address for fake in fakes),
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    started = Process(running, address)
    try:
        await started.until_logged("ready")
        yield started
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()


@pytest.mark.e2e
async def test_the_process_serves_and_its_streams_survive_sigterm(tmp_path: Path) -> None:
    """A rolling restart: it takes nothing new, lets the streams end, and exits with 0."""
    port = free_port()
    async with (
        engines(tmp_path, 1) as fakes,
        process(fakes, f"unix:{tmp_path}/router", "--metrics-port", str(port)) as started,
        SessionClient(started.address) as session,
    ):
        fakes[0].hold_at(2)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics") as answer:
            assert f'quire_router_in_flight_requests{{engine="{fakes[0].address}"}} 1.0' in answer.read().decode()
        started.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(session.draining.wait(), 10)
        fakes[0].hold_at(None)
        await assert_whole(stream, request)
        assert await started.exit_status() == 0
        assert not [line for line in started.lines if line["level"] in ("warning", "error")]


@pytest.mark.e2e
async def test_sigterm_ends_a_stream_that_does_not_end_itself(tmp_path: Path) -> None:
    """After the grace period there is an end event for each stream, status 0, and nothing held at the engine."""
    async with (
        engines(tmp_path, 1) as fakes,
        process(fakes, f"unix:{tmp_path}/router", "--grace", "0.1") as started,
        SessionClient(started.address) as session,
    ):
        fakes[0].hold_at(2)
        stream = session.submit(request_of(prompt_of(1)))
        await stream.until_tokens(2)
        started.process.send_signal(signal.SIGTERM)
        error = (await stream.result()).error
        assert error is not None and error.code is ErrorCode.UNAVAILABLE
        assert await started.exit_status() == 0
        await fakes[0].until(lambda: fakes[0].in_flight == 0)


@pytest.mark.e2e
async def test_a_router_that_is_killed_frees_what_it_had_at_the_engines(tmp_path: Path) -> None:
    """kill -9: the engine sees the session end; a router in its place takes the streams from their last token."""
    async with engines(tmp_path, 1) as fakes:
        fakes[0].hold_at(3)
        request = request_of(prompt_of(1))
        async with (
            process(fakes, f"unix:{tmp_path}/router") as started,
            SessionClient(started.address) as session,
        ):
            stream = session.submit(request)
            await stream.until_tokens(3)
            started.process.kill()
            await asyncio.wait_for(session.ended.wait(), 10)
            await fakes[0].until(lambda: fakes[0].in_flight == 0)
        fakes[0].hold_at(None)
        async with process(fakes, f"unix:{tmp_path}/router") as again, SessionClient(again.address) as session:
            resumed = session.submit(request_of(request.prompt_token_ids, output_token_ids=tuple(stream.token_ids)))
            await resumed.result()
            full = request_of(request.prompt_token_ids)
            whole = session.submit(full)
            await assert_whole(whole, full)
            assert stream.token_ids + resumed.token_ids == whole.token_ids


@pytest.mark.usefixtures("process_logging")
async def test_one_line_in_the_log_tells_of_each_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the trace's id, so that log and trace of one request are found from one another; without its text."""
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        setup_logging("router", style=LogFormat.JSON)
        for fake in fakes:
            fake.hold_at(3)
        request = request_of(prompt_of(1), trace=TraceContext(f"00-{trace_id}-00f067aa0ba902b7-01"))
        stream = session.submit(request)
        await stream.until_tokens(3)
        lost = holder_of(fakes, request)
        await lost.kill()
        for fake in fakes:
            fake.hold_at(None)
        await assert_whole(stream, request)
        assert all(each.trace.traceparent.split("-")[1] == trace_id for fake in fakes for each in fake.submitted)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["message"] == "request"]
    (other,) = [fake.name for fake in fakes if fake is not lost]
    expected = {
        "level": "info", "request_id": request.request_id, "trace_id": trace_id, "model": "fake-model",
        "engine": other, "reason": "length", "prompt_tokens": 65, "cached_tokens": 0, "output_tokens": 8, "moves": 1,
    }  # fmt: skip
    assert expected.items() <= line.items()
    assert 0 <= line["first_token_seconds"] <= line["seconds"] < 60


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    """Dashboards and alerts rest on these names; a request that moves counts once."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        prompt = prompt_of(1)
        for _ in range(2):
            request = request_of(prompt)
            await assert_whole(session.submit(request), request)
            fake = holder_of(fakes, request)
            await until(lambda fake=fake: metric(service, "cache_events_total", engine=fake.address) == 2)
        where = {"engine": fake.address}
        assert metric(service, "requests_total", reason="LENGTH", code="") == 2
        assert metric(service, "prompt_tokens_total", **where) == 130
        assert metric(service, "prefix_hit_tokens_total", **where) == 64
        assert metric(service, "time_to_first_token_seconds_count") == 2
        assert metric(service, "decision_seconds_count") == 2
        assert metric(service, "index_pages") == 4
        fake.hold_at(1)
        cancelled = session.submit(request_of(prompt))
        await cancelled.until_tokens(1)
        assert metric(service, "in_flight_requests", **where) == 1
        session.cancel(cancelled)
        await cancelled.result()
        assert metric(service, "requests_total", reason="CANCELLED", code="") == 1
        assert metric(service, "in_flight_requests", **where) == 0

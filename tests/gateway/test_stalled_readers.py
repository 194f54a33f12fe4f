"""Clients that stop reading what they asked for, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from certificate_files import CertificateFiles, new_ca
from fake_router import FakeRouter, Submission
from gateway_process import GatewayProcess
from gateway_testing import MODEL, StartGateway, eventually, until_ready
from raw_client import RawClient

from quire.gateway.server import Gateway
from quire.service.grpc_server import channel
from quire.service.request import FinishReason
from quire.v1 import inference_pb2, inference_pb2_grpc

ENDLESS = {"prompt": "Hi", "stream": True, "max_tokens": 8000}
# 80 characters each, so that buffers are soon full.
LONG_LINES = [45855] * 50

Start = Callable[..., Awaitable[Gateway]]
Connect = Callable[..., Awaitable[RawClient]]


@pytest.fixture
def answer() -> None:
    """Tests here answer as the router themselves."""


@pytest.fixture
def start(start_gateway: StartGateway, router: FakeRouter) -> Start:
    async def start(**config: Any) -> Gateway:
        gateway = await start_gateway(router.address, **config)
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            await until_ready(http)
        return gateway

    return start


async def stalled_readers(url: str, api: str = "http") -> float:
    """As counted for Prometheus."""
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{url}/metrics")).text.splitlines()
    name = f'quire_gateway_stalled_readers_total{{api="{api}"}}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def feed(submissions: Sequence[Submission], tokens: list[int], until: Submission) -> None:
    """Steps of an engine, until the gateway cancels what nobody reads."""
    async with asyncio.timeout(20):
        while not until.cancelled.is_set():
            for submission in submissions:
                submission.send(tokens)
            # So that one who reads keeps up.
            await asyncio.sleep(0.005)


def last_event(stream: bytes) -> dict[str, Any]:
    """Of a stream that ends as HTTP has it."""
    body, _, rest = stream.rpartition(b"0\r\n\r\n")
    assert not rest
    event: dict[str, Any] = json.loads(body.rpartition(b"data: ")[2])
    return event


async def test_a_reader_that_stalls_is_told_and_cut_off(
    start: Start,
    router: FakeRouter,
    connect: Connect,
    encode: Callable[[str], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without it clients that stop reading would hold an engine's slot, and the memory of what they don't read."""
    gateway = await start(write_timeout=1.5)
    stalled, reading = await connect(gateway.url), await connect(gateway.url)
    await stalled.post(ENDLESS | {"model": MODEL})
    lost = await router.next()
    await reading.post(ENDLESS | {"model": MODEL}, connection="close")
    kept = await router.next()
    read = asyncio.create_task(reading.rest())
    for submission in (lost, kept):
        submission.send(cached=0)
    with caplog.at_level(logging.WARNING, "quire.gateway.connection"):
        await feed((lost, kept), encode(" word") * 8, until=lost)
    # It wakes up while there is time.
    cut = await stalled.rest()
    assert last_event(cut)["error"]["code"] == "reader_stalled" and b"[DONE]" not in cut
    (warning,) = (record for record in caplog.records if "stopped reading" in record.message)
    assert warning.__dict__["unread_bytes"] < 8192
    assert await stalled_readers(gateway.url) == 1
    assert not kept.cancelled.is_set()
    kept.send(encode(" end"), finish=FinishReason.STOP)
    whole = await read
    assert b"[DONE]" in whole and whole.endswith(b"0\r\n\r\n")


async def test_a_reader_that_never_wakes_holds_nothing(start: Start, router: FakeRouter, connect: Connect) -> None:
    """Without it the last words of a stream would wait for their reader for ever."""
    gateway = await start(write_timeout=0.2)
    before = len(asyncio.all_tasks())
    connections = gateway._http._server.server_state.connections
    client = await connect(gateway.url)
    await client.post(ENDLESS | {"model": MODEL})
    lost = await router.next()
    lost.send(cached=0)
    await feed([lost], LONG_LINES, until=lost)

    async def held() -> tuple[int, int]:
        return len(asyncio.all_tasks()) - before, len(connections)

    await eventually(held, lambda counts: counts == (0, 0))


async def test_an_answer_that_nobody_reads_closes_its_connection(
    start: Start, router: FakeRouter, connect: Connect, encode: Callable[[str], list[int]]
) -> None:
    """Without it an answer that has ended, but is not read to its end, would hold its connection for ever."""
    gateway = await start(write_timeout=0.2)
    client = await connect(gateway.url)
    await client.post({"model": MODEL, "prompt": "Hi", "max_tokens": 8000}, connection="close")
    (await router.next()).send(encode(" word") * 7990, cached=0, finish=FinishReason.STOP)
    await eventually(lambda: stalled_readers(gateway.url), lambda count: count == 1)
    assert b"finish_reason" not in await client.rest()


async def test_a_slow_reader_of_a_long_answer_gets_all_of_it(
    start: Start, router: FakeRouter, connect: Connect, encode: Callable[[str], list[int]]
) -> None:
    """Without it one who takes longer than the limit for all of an answer, but goes on reading, would lose its end."""
    gateway = await start(write_timeout=0.3)
    client = await connect(gateway.url)
    await client.post({"model": MODEL, "prompt": "Hi", "max_tokens": 8000}, connection="close")
    (await router.next()).send(LONG_LINES * 40, cached=0, finish=FinishReason.STOP)
    began = asyncio.get_running_loop().time()
    read = b""
    while part := await client.read(16384):
        read += part
        # As over a slow line.
        await asyncio.sleep(0.04)
    assert b"finish_reason" in read
    assert asyncio.get_running_loop().time() - began > 2 * 0.3


async def test_a_gateway_that_stood_still_blames_no_reader(
    start: Start, router: FakeRouter, connect: Connect, encode: Callable[[str], list[int]]
) -> None:
    """Without it a pause of the machine, or a process without CPU time, would cut off all who are being answered."""
    gateway = await start(write_timeout=0.3)
    client = await connect(gateway.url)
    await client.post(ENDLESS | {"model": MODEL}, connection="close")
    submission = await router.next()
    submission.send(cached=0)
    connections = gateway._http._server.server_state.connections
    async with asyncio.timeout(20):
        while not any(connection._writing for connection in connections):
            submission.send(LONG_LINES)
            await asyncio.sleep(0)
    time.sleep(0.9)  # noqa: ASYNC251 (nothing in this process may run)
    submission.send(encode(" end"), finish=FinishReason.STOP)
    assert b"[DONE]" in await client.rest()
    assert await stalled_readers(gateway.url) == 0


async def test_one_who_reads_is_never_taken_for_one_who_stalls(
    start: Start, router: FakeRouter, encode: Callable[[str], list[int]]
) -> None:
    """Without it a look at a moment when an event is on its way would end the stream of a client that reads."""
    gateway = await start(write_timeout=0.05)
    word = encode(" word")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        for _ in range(4):
            # On one connection: what is left of an answer must not count against the next.
            asked = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi"}))
            (await router.next()).send(word, cached=0, finish=FinishReason.STOP)
            assert (await asked).status_code == 200
            stream = asyncio.create_task(http.post("/v1/completions", json=ENDLESS | {"model": MODEL}))
            submission = await router.next()
            submission.send(cached=0)
            end = asyncio.get_running_loop().time() + 0.12
            while asyncio.get_running_loop().time() < end:
                submission.send(word)
                await asyncio.sleep(0)
            submission.send(word, finish=FinishReason.STOP)
            assert "[DONE]" in (await stream).text
    assert await stalled_readers(gateway.url) == 0


async def test_a_grpc_reader_that_stalls(start: Start, router: FakeRouter) -> None:
    """Without it the same readers would only have to come through the other door."""
    gateway = await start(write_timeout=0.5, grpc_listen="127.0.0.1:0")
    request = inference_pb2.GenerateStreamRequest(
        prompt=inference_pb2.Prompt(text="Hi"), options=inference_pb2.GenerationOptions(max_tokens=8000)
    )

    async def held() -> int:
        return sum("GenerateStream" in task.get_name() for task in asyncio.all_tasks())

    async with channel(gateway.grpc_address) as dialed:
        stub = inference_pb2_grpc.InferenceServiceStub(dialed)
        wakes, sleeps = stub.GenerateStream(request), stub.GenerateStream(request)
        submissions = [await router.next() for _ in range(2)]
        for submission in submissions:
            submission.send(cached=0)
        for call in (wakes, sleeps):
            await call.initial_metadata()
        # Never read: gRPC's window fills up.
        for submission in submissions:
            await feed(submissions, LONG_LINES * 10, until=submission)
        with pytest.raises(grpc.aio.AioRpcError, match="has read nothing") as error:
            async for _ in wakes:
                pass
        assert error.value.code() is grpc.StatusCode.CANCELLED
        await eventually(held, lambda count: count == 0)
        assert await stalled_readers(gateway.url, "grpc") == 2


def sockets_of(pid: int) -> int:
    """How many a process has open."""
    files = [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]
    return sum(file.startswith("socket:") for file in files)


@pytest.mark.e2e
@pytest.mark.parametrize("tls", [False, True])
async def test_stalled_readers_of_a_process(tmp_path: Path, connect: Connect, tls: bool) -> None:
    """Without it readers could be told and cut off on asyncio's loop only, and a process has another one."""
    ca = new_ca()
    files = CertificateFiles(tmp_path).write(ca)
    flags = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key)] if tls else []
    context = ssl.create_default_context(cafile=files.ca) if tls else None
    router = await FakeRouter(f"unix:{tmp_path}/router.sock", "tiny").start()
    process = await GatewayProcess.start(router.address, "--write-timeout", "1.5", *flags)

    async def connections() -> int:
        return sockets_of(process.process.pid)

    try:
        await asyncio.wait_for(router.connected.wait(), 10)
        before = await connections()
        clients = [await connect(process.url, context) for _ in range(2)]
        for client in clients:
            await client.post(ENDLESS | {"model": "tiny"})
        submissions = [await router.next() for _ in clients]
        for submission in submissions:
            submission.send(cached=0)
        await feed(submissions, LONG_LINES, until=submissions[0])
        await feed(submissions[1:], LONG_LINES, until=submissions[1])
        woken = await clients[0].rest()
        assert last_event(woken)["error"]["code"] == "reader_stalled" and b"[DONE]" not in woken
        # The other never reads.
        await eventually(connections, lambda count: count == before)
        assert len(await process.until_logged("(a client has stopped reading)", 2)) == 2
    finally:
        await process.stop()
        await router.kill()

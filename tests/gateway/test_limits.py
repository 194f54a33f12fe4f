"""The gateway's own limits, met by clients that are slow, large or many."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
from fake_router import FakeRouter
from gateway_testing import MODEL, StartGateway, eventually, until_ready

from quire.gateway.__main__ import build_config, build_parser
from quire.gateway.config import GatewayConfig
from quire.gateway.http_server import HttpServer
from quire.gateway.server import Gateway
from quire.service.errors import ConfigError
from quire.service.grpc_server import channel
from quire.service.request import FinishReason
from quire.v1 import inference_pb2, inference_pb2_grpc

COMPLETION = {"model": MODEL, "prompt": "Hi"}

Start = Callable[..., Any]
Connect = Callable[[Gateway], Any]


@pytest.fixture
def answer() -> None:
    """Tests here answer as the router themselves, unless they say otherwise."""


@pytest.fixture
def start(start_gateway: StartGateway, router: FakeRouter) -> Start:
    async def start(**config: Any) -> Gateway:
        gateway = await start_gateway(router.address, **config)
        async with httpx.AsyncClient(base_url=gateway.url) as http:
            await until_ready(http)
        return gateway

    return start


class Raw:
    """A client on a bare socket, for what no library would do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, gateway: Gateway) -> Raw:
        # A small window, so that what the kernel takes for a reader that has stopped is little.
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        port = int(gateway.url.rpartition(":")[2])
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=connection, limit=2048))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, body: dict[str, Any], **headers: str) -> None:
        raw = json.dumps(body).encode()
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{extra}content-length: {len(raw)}\r\n\r\n"
        await self.send(head.encode() + raw)

    async def rest(self) -> bytes:
        """All that comes until the other side closes."""
        try:
            return await asyncio.wait_for(self.reader.read(-1), 10)
        except ConnectionResetError:
            return b""

    async def status(self) -> int:
        answer = await self.rest()
        return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    opened: list[Raw] = []

    async def connect(gateway: Gateway) -> Raw:
        opened.append(await Raw.connect(gateway))
        return opened[-1]

    yield connect
    for raw in opened:
        raw.writer.close()


async def metric(gateway: Gateway, name: str) -> float:
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{gateway.url}/metrics")).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little of what a client does not read is taken by the kernel, which would hold megabytes."""
    listen = HttpServer._listen

    def listen_small(server: HttpServer) -> socket.socket:
        listener = listen(server)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(HttpServer, "_listen", listen_small)


@pytest.mark.usefixtures("small_buffers")
async def test_reader_that_stalls_is_cut_off(
    start: Start, router: FakeRouter, connect: Connect, encode: Callable[[str], list[int]]
) -> None:
    """Without it clients that stop reading would hold an engine's slot, and the memory of what they don't read."""
    gateway = await start(write_timeout=0.2)
    stalled, reading = await connect(gateway), await connect(gateway)
    await stalled.post(COMPLETION | {"stream": True, "max_tokens": 8000})
    lost = await router.next()
    await reading.post(COMPLETION | {"stream": True, "max_tokens": 8000}, connection="close")
    kept = await router.next()
    read = asyncio.create_task(reading.rest())
    tokens = encode(" word") * 8
    for submission in (lost, kept):
        submission.send(cached=0)
    async with asyncio.timeout(20):
        while not lost.cancelled.is_set():
            for submission in (lost, kept):
                submission.send(tokens)
            # As an engine's steps, so that the one who reads keeps up.
            await asyncio.sleep(0.005)
    assert not kept.cancelled.is_set()
    assert await metric(gateway, 'quire_gateway_stalled_readers_total{api="http"}') == 1
    kept.send(encode(" end"), finish=FinishReason.STOP)
    whole = await read
    assert b"[DONE]" in whole and whole.endswith(b"0\r\n\r\n")
    # No event can say so, but the cut is no end: the last chunk is missing, too.
    cut = await stalled.rest()
    assert b"[DONE]" not in cut and not cut.endswith(b"0\r\n\r\n")


@pytest.mark.usefixtures("small_buffers")
async def test_answer_that_nobody_reads_closes_its_connection(
    start: Start, router: FakeRouter, connect: Connect, encode: Callable[[str], list[int]]
) -> None:
    """Without it an answer that has ended, but is not read to its end, would hold its connection for ever."""
    gateway = await start(write_timeout=0.2)
    client = await connect(gateway)
    await client.post(COMPLETION | {"max_tokens": 8000}, connection="close")
    # More than the kernel takes, less than makes the transport tell that it is full.
    (await router.next()).send(encode(" word") * 7990, cached=0, finish=FinishReason.STOP)
    await eventually(
        lambda: metric(gateway, 'quire_gateway_stalled_readers_total{api="http"}'), lambda count: count == 1
    )
    assert b"finish_reason" not in await client.rest()


async def test_stalled_grpc_reader(start: Start, router: FakeRouter, encode: Callable[[str], list[int]]) -> None:
    """Without it the same reader would only have to come through the other door."""
    gateway = await start(write_timeout=0.2, grpc_listen="127.0.0.1:0")
    request = inference_pb2.GenerateStreamRequest(
        prompt=inference_pb2.Prompt(text="Hi"), options=inference_pb2.GenerationOptions(max_tokens=8000)
    )
    async with channel(gateway.grpc_address) as dialed:
        call = inference_pb2_grpc.InferenceServiceStub(dialed).GenerateStream(request)
        submission = await router.next()
        submission.send(cached=0)
        tokens = encode(" word") * 7000
        # Never read: gRPC's window fills up.
        submission.send(tokens)
        await call.initial_metadata()

        async def feed() -> None:
            while not submission.cancelled.is_set():
                submission.send(tokens[:20])
                await asyncio.sleep(0)

        await asyncio.wait_for(feed(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in call:
                pass
        assert error.value.code() is grpc.StatusCode.CANCELLED
    assert await metric(gateway, 'quire_gateway_stalled_readers_total{api="grpc"}') == 1


async def test_heads(start: Start, connect: Connect) -> None:
    """Without it a head without an end would fill the memory, in one piece or in many."""
    gateway = await start(max_header_bytes=2048)
    for pieces in (1, 40):
        client = await connect(gateway)
        head = b"GET /health HTTP/1.1\r\nx: " + b"y" * 4000
        await client.send(head[:100])
        for piece in range(pieces):
            await client.send(head[100 + piece * 3900 // pieces : 100 + (piece + 1) * 3900 // pieces])
        answer = await client.rest()
        # One who goes on sending may have its connection reset before it has read why.
        if pieces == 1 or answer:
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"--max-header-bytes" in answer
    client = await connect(gateway)
    await client.send(b"GET /health HTTP/1.1\r\nconnection: close\r\nx: " + b"y" * 1900 + b"\r\n\r\n")
    assert await client.status() == 200
    client = await connect(gateway)
    await client.send(b"HELLO\r\n\r\n")
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"invalid_request_error" in answer


async def test_slow_senders(start: Start, connect: Connect) -> None:
    """Without it connections that send a byte now and then would pile up."""
    gateway = await start(read_timeout=0.2)
    silent, head, body = [await connect(gateway) for _ in range(3)]
    await head.send(b"GET /heal")
    await body.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert await silent.rest() == b""
    assert await head.status() == 408
    answer = await body.rest()
    assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer


async def test_deadline(start: Start, router: FakeRouter) -> None:
    """Without it a client's patience would not reach the engine, or a hung engine would hold its answer for ever."""
    gateway = await start(request_timeout=5)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        answer = await http.post("/v1/completions", json=COMPLETION, headers={"X-Request-Timeout": "0.2"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        submission = await router.next()
        assert submission.request.deadline_unix_ms is not None
        await asyncio.wait_for(submission.cancelled.wait(), 10)

        stream = asyncio.create_task(
            http.post("/v1/completions", json=COMPLETION | {"stream": True}, headers={"X-Request-Timeout": "0.3"})
        )
        submission = await router.next()
        submission.send(cached=0)
        body = (await stream).text
        assert '"code":"deadline_exceeded"' in body and "[DONE]" not in body
        await asyncio.wait_for(submission.cancelled.wait(), 10)

        for wrong in ("soon", "0", "-1", "nan", "inf", ""):
            answer = await http.post("/v1/completions", json=COMPLETION, headers={"X-Request-Timeout": wrong})
            assert answer.status_code == 400, wrong
            assert answer.json()["error"]["param"] == "X-Request-Timeout"

        unhurried = asyncio.create_task(http.post("/v1/completions", json=COMPLETION))
        submission = await router.next()
        assert submission.request.deadline_unix_ms is not None
        submission.send(cached=0, finish=FinishReason.STOP)
        assert (await unhurried).status_code == 200


async def test_requests_in_flight(start: Start, router: FakeRouter) -> None:
    """Without it a gateway would take requests until it dies of them all."""
    gateway = await start(max_requests=1)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http, channel(gateway.grpc_address) as dialed:
        first = asyncio.create_task(http.post("/v1/completions", json=COMPLETION))
        submission = await router.next()
        answer = await http.post("/v1/completions", json=COMPLETION)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        assert "--max-requests" in answer.json()["error"]["message"]
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await inference_pb2_grpc.InferenceServiceStub(dialed).Generate(request)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await http.get("/health")).status_code == 200
        submission.send(cached=0, finish=FinishReason.STOP)
        assert (await first).status_code == 200


async def test_choices(start: Start) -> None:
    """Without it one request could ask for more sequences than an engine has places."""
    gateway = await start(max_choices=2)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
        answer = await http.post("/v1/completions", json=COMPLETION | {"prompt": ["a", "b", "c"]})
        assert answer.status_code == 400
        assert "at most 2" in answer.json()["error"]["message"]


async def test_request_ids_over_grpc(start: Start, router: FakeRouter) -> None:
    """Without it a client could not find its gRPC request in the gateway's log."""
    gateway = await start()
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))
    async with channel(gateway.grpc_address) as dialed:
        stub = inference_pb2_grpc.InferenceServiceStub(dialed)
        for metadata in ((("x-request-id", "mine-1"),), ()):
            call = stub.Generate(request, metadata=metadata)
            (await router.next()).send(cached=0, finish=FinishReason.STOP)
            given = dict(await call.initial_metadata())["x-request-id"]
            assert given == ("mine-1" if metadata else (await call).request_id)
            await call
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Generate(request, metadata=(("x-request-id", "x" * 300),))
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("asked", [False, True])
async def test_prompts_are_logged_only_if_asked_for(
    start: Start, router: FakeRouter, encode: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture, asked: bool
) -> None:
    """Without it what users write could end up in a log collector, in one of the many ways a request can go."""
    caplog.set_level(logging.DEBUG)
    gateway = await start(**({"log_prompts": True} if asked else {}), request_timeout=5)
    secret = "xylophone-secret"
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as http, channel(gateway.grpc_address) as dialed:
        stub = inference_pb2_grpc.InferenceServiceStub(dialed)
        bodies: list[dict[str, Any]] = [
            {"prompt": secret, "stream": True},
            {"prompt": secret, "stop": [secret]},
            {"prompt": [secret], "max_tokens": -1},
            {"prompt": secret, "no_such_field": secret},
            {"prompt": {"a": secret}},
            {"prompt": secret * 9000},
        ]
        for body in bodies:
            task = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL} | body))
            if body in bodies[:2]:
                (await router.next()).send(encode(f" {secret}"), cached=0, finish=FinishReason.STOP)
            await task
        await http.post("/v1/chat/completions", content=secret.encode())
        roles = [{"role": secret, "content": secret}]
        await http.post("/v1/chat/completions", json={"model": MODEL, "messages": roles})
        call = stub.Generate(inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=secret)))
        (await router.next()).send(encode(f" {secret}"), cached=0, finish=FinishReason.STOP)
        await call
    # As the formatters write it: the message and every fact beside it.
    logged = "\n".join(str(vars(record)) for record in caplog.records)
    assert "cmpl-" in logged
    assert (secret in logged) is asked


async def test_metadata_over_grpc(start: Start) -> None:
    """Without it the limit on heads would hold for HTTP only."""
    gateway = await start(max_header_bytes=4096)
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="Hi"))
    async with channel(gateway.grpc_address) as dialed:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await inference_pb2_grpc.InferenceServiceStub(dialed).Generate(request, metadata=(("x", "y" * 8000),))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def config_of(*flags: str) -> GatewayConfig:
    return build_config(build_parser().parse_args(["--routers", "a:1", *flags]))


def test_flags() -> None:
    """Without it a flag could be parsed and lost."""
    flags = shlex.split(
        "--api-keys k --tls-cert c --tls-key d --tls-client-ca e --reload-interval 2 --max-requests 3 --max-choices 4 "
        "--max-header-bytes 5000 --read-timeout 6 --write-timeout 7 --request-timeout 8 --log-prompts --workers 9"
    )
    assert config_of(*flags) == GatewayConfig(
        routers=("a:1",),
        api_keys="k",
        tls_cert="c",
        tls_key="d",
        tls_client_ca="e",
        reload_interval=2,
        max_requests=3,
        max_choices=4,
        max_header_bytes=5000,
        read_timeout=6,
        write_timeout=7,
        request_timeout=8,
        log_prompts=True,
        workers=9,
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--workers 0",
        "--workers 65",
        "--max-requests 0",
        "--max-choices 0",
        "--max-header-bytes 100",
        "--read-timeout 0",
        "--write-timeout -1",
        "--request-timeout nan",
        "--reload-interval 0",
        "--tls-client-ca e",
        "--tls-key k",
        "--tls-cert c",
    ],
)
def test_wrong_flags_are_named(flags: str) -> None:
    """Without it a wrong flag would show only when a request fails."""
    with pytest.raises(ConfigError, match=flags.split()[0]):
        config_of(*flags.split())

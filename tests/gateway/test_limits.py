"""The gateway's own limits, met by clients that are slow, large or many."""

from __future__ import annotations

import asyncio
import logging
import shlex
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest
from fake_router import FakeRouter
from gateway_testing import MODEL, StartGateway, until_ready
from raw_client import RawClient

from quire.gateway.__main__ import build_config, build_parser
from quire.gateway.config import GatewayConfig
from quire.gateway.server import Gateway
from quire.service.errors import ConfigError
from quire.service.grpc_server import channel
from quire.service.request import FinishReason
from quire.v1 import inference_pb2, inference_pb2_grpc

COMPLETION = {"model": MODEL, "prompt": "Hi"}

Start = Callable[..., Any]
Connect = Callable[..., Awaitable[RawClient]]


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


async def test_heads(start: Start, connect: Connect) -> None:
    """Without it a head without an end would fill the memory, in one piece or in many."""
    gateway = await start(max_header_bytes=2048)
    for pieces in (1, 40):
        client = await connect(gateway.url)
        head = b"GET /health HTTP/1.1\r\nx: " + b"y" * 4000
        await client.send(head[:100])
        for piece in range(pieces):
            await client.send(head[100 + piece * 3900 // pieces : 100 + (piece + 1) * 3900 // pieces])
        answer = await client.rest()
        # One who goes on sending may have its connection reset before it has read why.
        if pieces == 1 or answer:
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert b"--max-header-bytes" in answer
    client = await connect(gateway.url)
    await client.send(b"GET /health HTTP/1.1\r\nconnection: close\r\nx: " + b"y" * 1900 + b"\r\n\r\n")
    assert await client.status() == 200
    client = await connect(gateway.url)
    await client.send(b"HELLO\r\n\r\n")
    answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 400 ") and b"invalid_request_error" in answer


async def test_slow_senders(start: Start, connect: Connect) -> None:
    """Without it connections that send a byte now and then would pile up."""
    gateway = await start(read_timeout=0.5)
    silent, head, body = [await connect(gateway.url) for _ in range(3)]
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

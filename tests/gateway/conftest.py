"""A gateway in this process, on loopback, in front of a fake router on a unix socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter, scripted
from gateway_testing import ANSWER, MODEL, StartGateway, until_ready
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from raw_client import RawClient

from quire.gateway.config import GatewayConfig
from quire.gateway.model import ServedModel
from quire.gateway.server import Gateway
from quire.service.checkpoint import TextModel, load_text, locate
from quire.service.tracing import Tracing


@pytest.fixture(scope="session")
def text_model() -> TextModel:
    """The embedded model's tokenizer and template."""
    return load_text(locate())


@pytest.fixture(scope="session")
def served_model(text_model: TextModel) -> ServedModel:
    return ServedModel((MODEL, "alias/with-slash"), text_model)


@pytest.fixture(scope="session")
def encode(text_model: TextModel) -> Callable[[str], list[int]]:
    return lambda text: list(text_model.tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def answer(encode: Callable[[str], list[int]], text_model: TextModel) -> Answer | None:
    """What the router does with each request; tests override it (None: the test answers by hand)."""
    return scripted([*encode(ANSWER), *text_model.eos_token_ids], cached=16)


@pytest.fixture
async def router(tmp_path: Path, answer: Answer | None) -> AsyncIterator[FakeRouter]:
    fake = await FakeRouter(f"unix:{tmp_path}/router.sock", MODEL, answer).start()
    yield fake
    await fake.kill()


@pytest.fixture
def spans() -> InMemorySpanExporter:
    """Every span that the gateway ended."""
    return InMemorySpanExporter()


@pytest.fixture
def tracing(spans: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing("gateway", processor=SimpleSpanProcessor(spans))
    yield tracing
    tracing.close()


@pytest.fixture
async def start_gateway(tmp_path: Path, served_model: ServedModel, tracing: Tracing) -> AsyncIterator[StartGateway]:
    """Starts gateways with the given config fields; closes them at the end."""
    started: list[tuple[Gateway, asyncio.Event, asyncio.Task[None]]] = []

    async def start(*routers: str, **config: Any) -> Gateway:
        fields = {"port": 0, "grpc_listen": f"unix:{tmp_path}/gateway-{len(started)}.sock", "grace": 0.0} | config
        gateway = Gateway(GatewayConfig(routers=routers, **fields), served_model, tracing)
        await gateway.start()
        stop = asyncio.Event()
        started.append((gateway, stop, asyncio.create_task(gateway.run(stop))))
        return gateway

    yield start
    for gateway, stop, running in started:
        stop.set()
        await running
        await gateway.close()


@pytest.fixture
async def gateway(start_gateway: StartGateway, router: FakeRouter) -> Gateway:
    gateway = await start_gateway(router.address)
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        await until_ready(http)
    return gateway


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=20) as client:
        yield client


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[RawClient]]]:
    """Connects to a URL, over TLS if a context comes with it; hangs up at the end."""
    opened: list[RawClient] = []

    async def connect(url: str, context: ssl.SSLContext | None = None) -> RawClient:
        opened.append(await RawClient.connect(url, context))
        return opened[-1]

    yield connect
    for client in opened:
        client.abort()

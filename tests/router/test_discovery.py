"""Engines come and go, by whatever names them: nothing in flight is lost when one does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from router_testing import (
    assert_whole,
    connected,
    endpoint_of,
    engines,
    gateway,
    holder_of,
    metric,
    prompt_of,
    request_of,
    router,
    until,
)

from quire.router import service as service_module
from quire.router.discovery import Addresses, discovery_of
from quire.router.discovery.dns import DnsNames, resolve
from quire.router.discovery.static import StaticAddresses
from quire.service.errors import ConfigError


class Found:
    """A discovery that finds what the test says."""

    def __init__(self, *fakes: FakeEngine) -> None:
        self._changes: asyncio.Queue[Addresses] = asyncio.Queue()
        self.now(*fakes)

    def now(self, *fakes: FakeEngine) -> None:
        self._changes.put_nowait(dict.fromkeys(fake.address for fake in fakes))

    async def addresses(self) -> AsyncIterator[Addresses]:
        while True:
            yield await self._changes.get()


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Found:
    discovery = Found()

    async def of(engines: tuple[str, ...], *, resolve_interval: float) -> Found:
        return discovery

    monkeypatch.setattr(service_module, "discovery_of", of)
    return discovery


async def test_engines_come_and_go_while_streams_run(tmp_path: Path, found: Found) -> None:
    """Scaling up adds an engine at once; scaling down takes no new requests there and cuts nothing off."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, wait=False) as service,
        gateway(service) as session,
    ):
        first, second = fakes
        found.now(first)
        await until(lambda: connected(service, 1))
        first.hold_at(2)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        found.now(first, second)
        await until(lambda: connected(service, 2))
        found.now(second)
        await until(lambda: endpoint_of(service, first).state == "withdrawn")
        new = request_of(prompt_of(1))
        await assert_whole(session.submit(new), new)
        assert holder_of(fakes, new) is second
        assert stream.finished is None
        first.hold_at(None)
        await assert_whole(stream, request)
        await until(lambda: [each.address for each in service.router.fleet.endpoints] == [second.address])
        await first.until(lambda: not first.sessions_open)
        assert metric(service, "prompt_tokens_total", engine=first.address) == 0
        await until(lambda: metric(service, "index_pages") == 4)


async def test_an_engine_that_is_found_again_was_never_away(tmp_path: Path, found: Found) -> None:
    """A probe that fails once, or a name server's hiccup, must not cost a session or a cache's copy."""
    async with (
        engines(tmp_path, 1) as fakes,
        router(tmp_path, fakes, wait=False) as service,
        gateway(service) as session,
    ):
        found.now(*fakes)
        await until(lambda: connected(service, 1))
        fakes[0].hold_at(2)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        endpoint = endpoint_of(service, fakes[0])
        found.now()
        await until(lambda: endpoint.withdrawn)
        held = request_of(prompt_of(2))
        waiting = session.submit(held)
        await until(lambda: metric(service, "held_requests") == 1)
        found.now(*fakes)
        fakes[0].hold_at(None)
        await assert_whole(stream, request)
        await assert_whole(waiting, held)
        assert fakes[0].sessions_opened == 1 and service.router.fleet.endpoints == [endpoint]
        # With nothing in flight it goes, and comes as a new one.
        found.now()
        await until(lambda: not service.router.fleet.endpoints)
        found.now(*fakes)
        await until(lambda: connected(service, 1))
        assert fakes[0].sessions_opened == 2


async def test_the_last_engine_stays_until_its_successor_takes_requests(tmp_path: Path, found: Found) -> None:
    """A pod is ready, and its predecessor told to go, before routers are connected to it: between them there were none.

    Then routers and gateways would be taken out of their Services, too, for as long as a probe's period.
    """
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, wait=False) as service,
        gateway(service) as session,
    ):
        first, second = fakes
        await second.kill()
        found.now(first)
        await until(lambda: connected(service, 1))
        found.now(second)
        await until(lambda: len(service.router.fleet.endpoints) == 2)
        request = request_of(prompt_of(1))
        await assert_whole(session.submit(request), request)
        assert service.router.ready and holder_of(fakes, request) is first
        await second.start()
        await until(lambda: [each.address for each in service.router.fleet.endpoints] == [second.address])
        assert service.router.ready
        found.now(first)
        await until(lambda: [each.address for each in service.router.fleet.endpoints] == [first.address])
        # One that drains by itself is waited for no longer.
        found.now(second)
        await second.kill()
        first.drain()
        await until(lambda: not service.router.ready)


async def test_a_withdrawn_engine_that_dies_loses_nothing(tmp_path: Path, found: Found) -> None:
    """A pod's end: out of the list first, then the process. What it still had goes on elsewhere."""
    async with (
        engines(tmp_path, 2) as fakes,
        router(tmp_path, fakes, wait=False) as service,
        gateway(service) as session,
    ):
        first, second = fakes
        found.now(first)
        await until(lambda: connected(service, 1))
        first.hold_at(3)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(3)
        found.now(second)
        await until(lambda: connected(service, 1) and endpoint_of(service, first).withdrawn)
        await first.kill()
        await assert_whole(stream, request)
        await until(lambda: len(service.router.fleet.endpoints) == 1)


async def test_a_name_is_looked_up_again_and_again() -> None:
    """Pods behind a headless Service change, and a name server that fails costs none of them."""
    answers: list[frozenset[str] | OSError] = [
        OSError("no such name"),
        frozenset({"10.0.0.1:9100"}),
        OSError("temporary failure"),
        frozenset({"10.0.0.1:9100"}),
        frozenset({"10.0.0.1:9100", "10.0.0.2:9100"}),
        frozenset({"10.0.0.2:9100"}),
    ]
    asked: list[tuple[str, int]] = []

    async def answer(host: str, port: int) -> frozenset[str]:
        asked.append((host, port))
        result = answers.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    names = DnsNames("engines", 9100, interval=0.0, resolve=answer).addresses()
    async with asyncio.timeout(10):
        seen = [await anext(names) for _ in range(3)]
    assert [set(each) for each in seen] == [
        {"10.0.0.1:9100"}, {"10.0.0.1:9100", "10.0.0.2:9100"}, {"10.0.0.2:9100"},
    ]  # fmt: skip
    assert asked == [("engines", 9100)] * 6


async def test_the_systems_resolver_is_asked() -> None:
    """Addresses become what gRPC dials, IPv6 in brackets; an unknown name is an OSError."""
    found = await resolve("localhost", 9100)
    assert found and found <= {"127.0.0.1:9100", "[::1]:9100"}
    assert await resolve("::1", 9100) == {"[::1]:9100"}
    with pytest.raises(OSError, match=r".+"):
        await resolve("no-such-name.invalid", 9100)


async def test_a_router_follows_a_name(tmp_path: Path) -> None:
    """The whole way: flag, resolver, session, request."""
    fake = await FakeEngine("127.0.0.1:0", "engine").start()
    port = fake.address.rpartition(":")[2]
    try:
        async with (
            router(tmp_path, [fake], engines=(f"dns:127.0.0.1:{port}",), resolve_interval=0.05) as service,
            gateway(service) as session,
        ):
            request = request_of(prompt_of(1))
            await assert_whole(session.submit(request), request)
    finally:
        await fake.kill()


async def test_flags_name_one_kind_of_source() -> None:
    """A flag that mixes them, or lacks the port, would otherwise never find an engine and never say why."""
    assert isinstance(await discovery_of(("a:1", "unix:/b"), resolve_interval=1), StaticAddresses)
    assert isinstance(await discovery_of(("dns:///engines.models:9100",), resolve_interval=1), DnsNames)
    for wrong in (("dns:engines",), ("dns::9100",), ("dns:engines:http",), ("dns:a:1", "b:2"), ("a:1", "dns:b:2"),
                  ("dns:a:99999",), ("kubernetes:",), ("kubernetes:models/:grpc",),
                  ("kubernetes:models/a+:grpc",)):  # fmt: skip
        with pytest.raises(ConfigError, match="--engines"):
            await discovery_of(wrong, resolve_interval=1)

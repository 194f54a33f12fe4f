"""Several worker processes on one port: one limit, one set of metrics, and a life after a worker's death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography import x509
from fake_router import FakeRouter, Submission
from gateway_process import GatewayProcess
from gateway_testing import eventually, until_ready
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.gateway.access.keys import digest_of, new_key
from quire.gateway.access.ledger import Ledger, Meter
from quire.service.request import FinishReason

WORKERS = 2


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[FakeRouter]:
    fake = await FakeRouter(f"unix:{tmp_path}/router.sock", "tiny").start()
    yield fake
    await fake.kill()


@pytest.fixture
async def start(tmp_path: Path, router: FakeRouter) -> AsyncIterator[Callable[..., Any]]:
    started: list[GatewayProcess] = []

    async def start(*flags: str) -> GatewayProcess:
        started.append(await GatewayProcess.start(router.address, "--workers", str(WORKERS), *flags))
        return started[-1]

    yield start
    for process in started:
        await process.stop()


async def ask(url: str, **fields: Any) -> httpx.Response:
    """Over a connection of its own, which the kernel gives to either worker."""
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"}, **fields)


async def answer_all(router: FakeRouter) -> None:
    while True:
        submission: Submission = await router.submitted.get()
        submission.send([5], cached=0, finish=FinishReason.STOP)


async def in_flight_and_ended(url: str) -> tuple[float, float]:
    """Over all workers, as whichever answers tells it."""
    async with httpx.AsyncClient() as http:
        lines = (await http.get(f"{url}/metrics")).text.splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    return total("quire_gateway_requests_in_flight"), total("quire_gateway_requests_total")


@pytest.mark.e2e
async def test_life_of_workers(start: Callable[..., Any], router: FakeRouter, tmp_path: Path) -> None:
    """Without it workers could fail to share the port, a limit or the metrics, stay dead, or outlive their parent."""
    key = new_key()
    file = tmp_path / "keys.jsonl"
    file.write_text(json.dumps({"hash": f"sha256:{digest_of(key).hex()}", "tenant": "a", "requests_per_minute": 8}))
    process = await start("--api-keys", str(file))
    async with asyncio.timeout(10):
        while len(router.peers) < WORKERS:
            router.connected.clear()
            await router.connected.wait()
    pids = {int(peer.rpartition("-")[2]) for peer in router.peers}
    headers = {"authorization": f"Bearer {key}"}
    answering = asyncio.create_task(answer_all(router))
    answers = await asyncio.gather(*(ask(process.url, headers=headers) for _ in range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 8 + [429] * 8
    # What has been answered is logged and counted a moment later.
    assert set(await process.until_logged(r"(gateway-\d).*over http", 16)) == {"gateway-0", "gateway-1"}
    await eventually(lambda: in_flight_and_ended(process.url), lambda counts: counts == (0, 16))
    answering.cancel()

    # Killed: the other goes on, the dead one is started again and counts on where it was.
    os.kill(min(pids), signal.SIGKILL)
    await process.until_logged(r"(is started again)")
    await process.until_logged(r"(worker listens)", WORKERS + 1)
    async with httpx.AsyncClient(base_url=process.url) as http:
        await until_ready(http)
    await eventually(lambda: in_flight_and_ended(process.url), lambda counts: counts == (0, 16))
    assert await process.stop() == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.e2e
async def test_what_is_in_flight_finishes(start: Callable[..., Any], router: FakeRouter) -> None:
    """Without it a rolling restart would break the streams of every worker."""
    process = await start()
    asked = [asyncio.create_task(ask(process.url)) for _ in range(4)]
    submissions = [await router.next() for _ in asked]
    process.process.send_signal(signal.SIGTERM)
    for submission in submissions:
        submission.send([5], cached=0, finish=FinishReason.STOP)
    assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 4
    assert await process.stop() == 0


@pytest.mark.e2e
async def test_certificates_on_uvloop(start: Callable[..., Any], tmp_path: Path) -> None:
    """Without it TLS could hold on asyncio's loop only, and a process has another one."""
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    context = ssl.create_default_context()
    ca.configure_trust(context)

    def renew() -> int:
        leaf = ca.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        certificate.write_bytes(leaf.cert_chain_pems[0].bytes())
        key.write_bytes(leaf.private_key_pem.bytes())
        return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number

    old = renew()
    process = await start("--tls-cert", str(certificate), "--tls-key", str(key), "--reload-interval", "0.05")
    port = int(process.url.rpartition(":")[2])

    async def shown() -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(der).serial_number

    assert await shown() == old
    new = renew()
    # Either worker may answer: all of some in a row are new once both have it.
    await eventually(lambda: asyncio.gather(*(shown() for _ in range(8))), lambda serials: set(serials) == {new})


@pytest.mark.e2e
async def test_worker_that_can_not_start_ends_the_parent(start: Callable[..., Any], tmp_path: Path) -> None:
    """Without it a wrong flag would be a loop of restarts."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "quire.gateway", "--routers", "unix:/x", "--workers", "2", "--port", "0"),
        *("--grpc-listen", "127.0.0.1:0", "--api-keys", "/no/such/file", "--grace", "0"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert b"/no/such/file" in errors


def test_ledger_is_shared(tmp_path: Path) -> None:
    """Without it each worker would grant the whole limit, or a worker that died would keep its places for good."""
    path = str(tmp_path / "ledger")
    first, second = Ledger(path, 0), Ledger(path, 1)
    one, other = digest_of("one"), digest_of("other")
    assert first.take(one, Meter.REQUESTS, 3, 4) == 0
    assert 0 < second.take(one, Meter.REQUESTS, 2, 4) <= 15
    assert second.take(one, Meter.TOKENS, 2, 4) == 0
    assert second.take(other, Meter.REQUESTS, 4, 4) == 0
    second.spend(other, Meter.REQUESTS, 4, 4)
    assert first.level(other, Meter.REQUESTS, 4) < -3.9
    assert [ledger.enter(one, 2) for ledger in (first, second, first, second)] == [True, True, False, False]
    assert Ledger(path, 0).enter(one, 2)
    second.leave(one)
    assert second.enter(one, 2) and not second.enter(one, 2)
    assert second.enter(other, 1)


@given(
    st.lists(st.tuples(st.sampled_from(["take", "spend", "wait"]), st.floats(0.1, 50), st.booleans()), max_size=40),
    st.integers(1, 600),
)
@settings(max_examples=60, deadline=None)
def test_rates_hold_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, float, bool]], limit: int
) -> None:
    """Without it some order of requests, outputs and pauses over two workers could get more than the limit."""
    now = 1000.0
    path = str(tmp_path_factory.mktemp("ledger") / "ledger")
    ledgers = [Ledger(path, index, lambda: now) for index in range(2)]
    digest, level = digest_of("key"), float(limit)
    for what, amount, second in steps:
        ledger = ledgers[second]
        if what == "wait":
            now += amount
            level = min(limit, level + amount * limit / 60)
        elif what == "spend":
            ledger.spend(digest, Meter.TOKENS, amount, limit)
            level -= amount
        elif abs(level - amount) > 1e-6:
            wait = ledger.take(digest, Meter.TOKENS, amount, limit)
            assert (wait == 0) == (level >= amount)
            # In as long as it says, there is enough.
            assert wait == pytest.approx(max(0.0, amount - level) * 60 / limit)
            level -= 0 if wait else amount
    for ledger in ledgers:
        assert ledger.level(digest, Meter.TOKENS, limit) == pytest.approx(level)
        ledger.close()

"""The scaler against pods that serve metrics over HTTP: what it reads, what it makes of it, whom it wakes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from operator_strategies import document
from prometheus_client import generate_latest

from quire.engine.metrics import EngineMetrics
from quire.operator import names
from quire.operator.canary import Tally, Trial
from quire.operator.load import Loads, engine_load, router_load, sample
from quire.operator.observed import Observed
from quire.operator.scaler import Scale, Scaler
from quire.operator.spec import InferenceService, Key, parse
from quire.router.fleet import Fleet
from quire.router.metrics import RouterMetrics
from quire.service.request import Finished, FinishReason

Document = dict[str, Any]

AUTOSCALED = parse(
    document({"engine": {"autoscaling": {"minReplicas": 0, "maxReplicas": 4, "idleSeconds": 1, "scaleInSeconds": 1}}})
)
ENGINE = """
quire_engine_running_requests{{engine="e"}} {running}
quire_engine_waiting_requests{{engine="e"}} 0
quire_engine_pending_prefill_tokens{{engine="e"}} {pending}
quire_engine_pages{{engine="e",state="used"}} {used}
quire_engine_pages{{engine="e",state="cached"}} 20
quire_engine_pages{{engine="e",state="free"}} {free}
# TYPE quire_engine_time_to_first_token_seconds histogram
quire_engine_time_to_first_token_seconds_bucket{{engine="e",le="0.5"}} {fast}
quire_engine_time_to_first_token_seconds_bucket{{engine="e",le="1.0"}} {all}
quire_engine_time_to_first_token_seconds_bucket{{engine="e",le="+Inf"}} {all}
"""


def engine_text(*, running: int = 0, pending: int = 0, used: int = 0, fast: int = 0, slow: int = 0) -> str:
    return ENGINE.format(running=running, pending=pending, used=used, free=80 - used, fast=fast, all=fast + slow)


def router_text(held: int = 0, ended: int = 0) -> str:
    return f'quire_router_held_requests {held}\nquire_router_requests_total{{reason="stop",code=""}} {ended}\n'


def test_it_reads_what_engines_and_routers_say() -> None:
    """The names are the services' own: a metric that is renamed there must fail here."""
    engine = engine_load(generate_latest(EngineMetrics("engine-0").registry).decode())
    assert (engine.requests, engine.queued_prefill_tokens, engine.pages_total) == (0, 0, 0)
    assert float("inf") in engine.first_tokens
    metrics = RouterMetrics()
    metrics.observe(Fleet(), held=lambda: 3)
    metrics.finished(Finished(FinishReason.STOP))
    metrics.left_engine("r2", failed=True)
    router = router_load(generate_latest(metrics.registry).decode())
    assert (router.requests, router.ended, router.attempts) == (3, 1, {("r2", "failed"): 1})
    for read in (engine_load, router_load):
        with pytest.raises(ValueError, match="there is no"):
            read("up 1\n")


def test_the_first_token_counts_since_the_last_look() -> None:
    """Of nine in ten, as Prometheus interpolates; hours of quick answers must not hide a slow minute."""
    old = {"a": engine_load(engine_text(fast=1000)), "b": engine_load(engine_text(fast=7))}
    new = {"a": engine_load(engine_text(fast=1000, slow=10)), "b": engine_load(engine_text(fast=7))}
    assert sample(Loads(1, old), None).first_token_seconds is None
    found = sample(Loads(2, new), Loads(1, old)).first_token_seconds
    assert found == pytest.approx(0.95)
    # One that has started anew counts from zero.
    again = {"a": engine_load(engine_text(fast=10)), "b": engine_load(engine_text(fast=7))}
    assert sample(Loads(3, again), Loads(2, new)).first_token_seconds == pytest.approx(0.45)


def test_who_does_not_answer_is_not_idle() -> None:
    """Half of the picture shows no request, either."""
    idle, quiet = engine_load(engine_text()), router_load(router_text(ended=5))
    whole = Loads(1, {"a": idle}, {"r": quiet})
    assert sample(whole, whole).is_idle
    assert not sample(whole, None).is_idle
    assert not sample(Loads(1, {"a": idle, "b": None}, {"r": quiet}), whole).is_idle
    assert not sample(Loads(1, {"a": idle}, {"r": None}), whole).is_idle
    assert not sample(Loads(1, {"a": idle}, {}), whole).is_idle
    assert not sample(Loads(1, {"a": idle}, {"r": router_load(router_text(ended=6))}), whole).is_idle


class Pods:
    """An engine and a router on addresses of this machine's own, whose words a test chooses."""

    def __init__(self) -> None:
        self.words = {"127.0.1.1": engine_text(), "127.0.1.2": router_text()}
        self.engines = 1
        self.asked = 0

    @property
    def observed(self) -> Observed:
        pods = [self._pod("router", "127.0.1.2"), *[self._pod("engine", "127.0.1.1")] * self.engines]
        unready = self._pod("engine", "127.0.1.9")
        unready["status"]["conditions"][0]["status"] = "False"
        return Observed(pods=(*pods, unready))

    def _pod(self, component: str, address: str) -> Document:
        ready = {"type": "Ready", "status": "True"}
        labels = {names.COMPONENT: component}
        return {"metadata": {"labels": labels}, "status": {"podIP": address, "conditions": [ready]}}

    @contextmanager
    def serving(self) -> Iterator[None]:
        pods = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                pods.asked += 1
                body = pods.words[self.server.server_address[0]].encode()  # type: ignore[index]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        ports = {"127.0.1.1": names.ENGINE_METRICS, "127.0.1.2": names.ROUTER_METRICS}
        servers = [ThreadingHTTPServer(address, Handler) for address in ports.items()]
        for server in servers:
            threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


@pytest.fixture
def pods() -> Iterator[Pods]:
    pods = Pods()
    with pods.serving():
        yield pods


class Woken:
    """Follows the service whenever the scaler says so, as the reconciler does."""

    def __init__(self, pods: Pods, previous: Document, service: InferenceService = AUTOSCALED) -> None:
        self.pods = pods
        self.seen: list[Scale] = []
        self._changed = asyncio.Event()
        self.scaler = Scaler(self._wake, interval=0.1)
        self.previous = previous
        self._service = service
        self.look()

    def look(self) -> Scale:
        self.seen.append(self.scaler.follow(self._service, self.pods.observed, self.previous))
        return self.seen[-1]

    def _wake(self, key: Key) -> None:
        assert key == self._service.key
        self.look()
        self._changed.set()

    async def until(self, replicas: int) -> None:
        async with asyncio.timeout(20):
            while self.seen[-1].replicas != replicas:
                await self.changed()

    async def changed(self) -> None:
        self._changed.clear()
        await self._changed.wait()


@pytest.fixture
async def woken(pods: Pods) -> AsyncIterator[Woken]:
    woken = Woken(pods, {})
    yield woken
    await woken.scaler.close()


async def test_a_service_scales_with_what_its_pods_say(pods: Pods, woken: Woken) -> None:
    """The whole round: too much waits, so engines come; nobody asks, so all go; one request is held, so one comes."""
    assert woken.seen == [Scale(1)]
    pods.words["127.0.1.1"] = engine_text(running=9, pending=100_000, used=40)
    pods.words["127.0.1.2"] = router_text(held=3)
    await woken.until(2)
    assert woken.seen[-1].load == 1220
    pods.words["127.0.1.1"] = engine_text()
    pods.words["127.0.1.2"] = router_text(ended=12)
    await woken.until(1)
    await woken.until(0)
    pods.engines = 0
    woken.look()
    pods.words["127.0.1.2"] = router_text(held=1, ended=12)
    await woken.until(1)


async def test_a_canarys_requests_are_counted_from_the_beginning_of_its_step(pods: Pods) -> None:
    """What was before says nothing about it, and a router counts from the beginning of its own life."""
    counter = 'quire_router_attempts_total{{revision="{}",outcome="{}"}} {}\n'
    told = {("", "ok"): 1000, ("r2", "ok"): 30, ("r2", "failed"): 5}

    def tell() -> None:
        pods.words["127.0.1.2"] = router_text() + "".join(counter.format(*key, told[key]) for key in told)

    tell()
    tried = parse(document({"rollout": {"canary": {}}}))
    woken = Woken(pods, {"rollout": {"phase": "Canary", "revision": "r2", "step": 0}}, tried)
    async with asyncio.timeout(20):
        # Its first look at the counters is where it counts from; the load is shown by then.
        await woken.changed()
        assert woken.look().trial == Trial()
        told[("", "ok")], told[("r2", "failed")] = 1090, 8
        tell()
        while woken.look().trial != Trial(new=Tally(3, 3), others=Tally(90, 0)):
            await woken.changed()
        woken.previous = {"rollout": {"phase": "Canary", "revision": "r2", "step": 1}}
        assert woken.look().trial == Trial()
    await woken.scaler.close()


async def test_the_last_engine_stays_until_every_router_holds_requests() -> None:
    """A router from before spec.engine.autoscaling is not ready without an engine, nor is a gateway behind it then."""
    scaler = Scaler(lambda key: None, interval=60)

    def wanted(engines: int, updated: int) -> int:
        engine = {"kind": "Deployment", "metadata": {"name": "demo-engine"}, "spec": {"replicas": engines}}
        status = {"replicas": 1, "availableReplicas": 1, "updatedReplicas": updated}
        router = {"kind": "Deployment", "metadata": {"name": "demo-router"}, "status": status}
        return scaler.follow(AUTOSCALED, Observed((engine, router)), {"desiredReplicas": 0}).replicas

    assert (wanted(engines=1, updated=0), wanted(engines=1, updated=1)) == (1, 0)
    # Nobody's sleep ends because routers are replaced.
    assert wanted(engines=0, updated=0) == 0
    await scaler.close()


async def test_an_operator_goes_on_where_another_ended(pods: Pods) -> None:
    """Its successor must not begin with spec.engine.replicas while the load is what it is."""
    woken = Woken(pods, {"desiredReplicas": 3})
    assert woken.seen == [Scale(3)]
    await woken.scaler.close()

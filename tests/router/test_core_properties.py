"""The core in random lives: submits, cancels, deaths, drains, refusals, engines and gateways that come and go.

Whatever happens, each request gets its tokens once and in order and exactly one end, the right one, and when all is
over nothing is left of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
from fake_engine import MODEL, token_at
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from router_testing import request_of

from quire.router.core import Router
from quire.router.endpoint import NO_LOAD, Endpoint, Phase
from quire.router.flight import Peer
from quire.router.metrics import RouterMetrics
from quire.service.errors import ErrorCode, InvalidRequestError, OverloadedError, QuireError, UnavailableError
from quire.service.pages import PAGE_SIZE
from quire.service.request import Finished, FinishReason, Request, Started, Update
from quire.service.tracing import Tracing

HOLD = 5.0
MAX_MOVES = 2
NUM_ENGINES = 3
NUM_PEERS = 2

engines = st.integers(0, NUM_ENGINES - 1)
peers = st.integers(0, NUM_PEERS - 1)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    topic, pages, length = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 6))
    prompt = tuple(topic * 1000 + position for position in range(pages * PAGE_SIZE + 1))
    # Some were moved here by their gateway, some end at a stop token.
    before = draw(st.integers(0, min(2, length - 1)))
    stop = draw(st.none() | st.integers(before, 7))
    return request_of(
        prompt, length, model=draw(st.sampled_from([*[MODEL] * 9, "other"])),
        stop_token_ids=() if stop is None else (token_at(prompt, stop),),
        output_token_ids=tuple(token_at(prompt, position) for position in range(before)),
    )  # fmt: skip


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time goes on only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def turn(self) -> None:
        """Runs what is due."""
        self.run_until_complete(asyncio.sleep(0))
        self.run_until_complete(asyncio.sleep(0))


@dataclass(eq=False)
class Asked:
    """A request as its gateway sees it."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    starts: int = 0
    ends: list[Finished] = field(default_factory=list)
    cancelled: bool = False
    # How often an engine was sent it again without a token in between.
    vain: int = -1
    # Something happened that may end it with this error.
    excuses: set[ErrorCode] = field(default_factory=set)

    @property
    def full(self) -> list[int]:
        """All tokens that it will ever get, those from before included."""
        request = self.request
        tokens = []
        for position in range(request.stop.max_tokens):
            tokens.append(token_at(request.prompt_token_ids, position))
            if tokens[-1] in request.stop.stop_token_ids:
                break
        return tokens

    def take(self, update: Update) -> None:
        assert not self.ends, "an update after the end"
        self.tokens.extend(update.token_ids)
        if update.token_ids:
            self.vain = 0
        self.starts += update.started is not None
        before = len(self.request.output_token_ids)
        assert self.tokens == self.full[before : before + len(self.tokens)], "tokens that are not the next ones"
        assert self.starts <= 1
        if update.finished is not None:
            self.ends.append(update.finished)
            self.check_end(update.finished)

    def check_end(self, finished: Finished) -> None:
        match finished.reason:
            case FinishReason.CANCELLED:
                assert self.cancelled
            case FinishReason.ERROR:
                assert finished.error is not None and finished.error.code in self.excuses
            case reason:
                assert [*self.request.output_token_ids, *self.tokens] == self.full
                stopped = self.full[-1] in self.request.stop.stop_token_ids
                assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


class Gateway:
    """A session's far end."""

    def __init__(self) -> None:
        self.asked: dict[int, Asked] = {}
        self.here = True
        self.drain_announced = 0
        self.peer = Peer(self.deliver, self.announce)

    def deliver(self, updates: list[Update]) -> None:
        assert self.here and updates
        for update in updates:
            self.asked[update.key].take(update)

    def announce(self) -> None:
        self.drain_announced += 1


class Engine:
    """The far end of an engine's session: what it was sent, under the keys it was sent with."""

    def __init__(self, endpoint: Endpoint, sent: Callable[[Request], None]) -> None:
        self.endpoint = endpoint
        self.sent = sent
        self.connected = False
        self.steps = 0
        self.holds: dict[int, Request] = {}
        self.position: dict[int, int] = {}
        self.cancels: list[int] = []

    def submit(self, key: int, request: Request) -> None:
        assert self.connected and key not in self.position, "a key was used twice"
        self.sent(request)
        self.holds[key] = request
        self.position[key] = len(request.output_token_ids)

    def cancel(self, key: int) -> None:
        assert self.connected
        self.cancels.append(key)

    def next_updates(self, count: int) -> list[Update]:
        """What a step tells of the first `count` of its requests."""
        cancelled = [key for key in self.cancels if self.holds.pop(key, None) is not None]
        updates = [Update(key, finished=Finished(FinishReason.CANCELLED)) for key in cancelled]
        self.cancels.clear()
        for key, request in list(self.holds.items())[:count]:
            token = token_at(request.prompt_token_ids, self.position[key])
            started = Started(PAGE_SIZE) if self.position[key] == len(request.output_token_ids) else None
            self.position[key] += 1
            finished = None
            if token in request.stop.stop_token_ids:
                finished = Finished(FinishReason.STOP)
            elif self.position[key] == request.stop.max_tokens:
                finished = Finished(FinishReason.LENGTH)
            if finished is not None:
                del self.holds[key]
            updates.append(Update(key, (token,), started, finished))
        return updates


class CoreMachine(RuleBasedStateMachine):
    """Every rule is one event in the router; the loop's time stands still between them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.metrics = RouterMetrics()
        self.keys = 0
        self.failures: list[object] = []
        self.clock.set_exception_handler(lambda _, context: self.failures.append(context))

    @initialize()
    def start(self) -> None:
        self.router = Router(
            hold=HOLD, max_moves=MAX_MOVES, retry_share=0.5, tracer=Tracing("test").tracer, metrics=self.metrics
        )
        self.engines = [Engine(self.router.add_engine(f"engine-{index}"), self.sent) for index in range(NUM_ENGINES)]
        self.gateways = [Gateway() for _ in range(NUM_PEERS)]
        for gateway in self.gateways:
            self.router.join(gateway.peer)
        self.everybody: list[Asked] = []
        for number in range(NUM_ENGINES):
            self.connect(number)

    def do(self, event: Callable[[], object]) -> None:
        """Runs one event inside the loop, then what it made due."""

        async def run() -> None:
            event()

        self.clock.run_until_complete(run())
        self.clock.turn()

    # Gateways

    @rule(peer=peers, requests=st.lists(requests(), min_size=1, max_size=3))
    def submit(self, peer: int, requests: list[Request]) -> None:
        gateway = self.gateways[peer]
        for request in requests:
            asked = Asked(replace(request, request_id=f"request-{len(self.everybody)}"))
            if request.model != MODEL:
                asked.excuses |= {ErrorCode.NOT_FOUND, ErrorCode.UNAVAILABLE}
            self.keys += 1
            gateway.asked[self.keys] = asked
            self.everybody.append(asked)
            self.do(lambda asked=asked: self.router.submit(gateway.peer, self.keys, asked.request))

    @rule(peer=peers, which=st.integers(0, 100), known=st.booleans())
    def cancel(self, peer: int, which: int, known: bool) -> None:
        gateway = self.gateways[peer]
        key = 10**6
        if known and gateway.asked:
            key = list(gateway.asked)[which % len(gateway.asked)]
            gateway.asked[key].cancelled = True
        self.do(lambda: self.router.cancel(gateway.peer, key))

    @rule(peer=peers)
    def leave_and_come_back(self, peer: int) -> None:
        gateway = self.gateways[peer]
        gateway.here = False
        self.do(lambda: self.router.leave(gateway.peer))
        assert not gateway.peer.flights
        self.gateways[peer] = Gateway()
        self.do(lambda: self.router.join(self.gateways[peer].peer))

    # Engines

    def sent(self, request: Request) -> None:
        asked = self.asked_of(request)
        assert asked is not None and not asked.ends, "an engine got a request that is over"
        assert request.output_token_ids == (*asked.request.output_token_ids, *asked.tokens), (
            "not from its last token on"
        )
        assert not asked.cancelled, "an engine got a request that was taken back"
        asked.vain += 1

    @rule(count=st.integers(1, 4))
    def step_all(self, count: int) -> None:
        for number in range(NUM_ENGINES):
            self.step(number, count)

    @rule(number=engines, count=st.integers(1, 4))
    def step(self, number: int, count: int) -> None:
        engine = self.engines[number]
        if engine.connected and (engine.holds or engine.cancels):
            updates = engine.next_updates(count)
            self.do(lambda: self.router.engine_stepped(engine.endpoint, updates))

    @rule(number=engines)
    def die_before_the_end(self, number: int) -> None:
        """It tells the last tokens and dies before it tells that they are."""
        engine = self.engines[number]
        while engine.connected and engine.holds:
            updates = [update._replace(finished=None) for update in engine.next_updates(1)]
            self.do(lambda updates=updates: self.router.engine_stepped(engine.endpoint, updates))
        self.lose(number)

    @rule(number=engines, which=st.integers(0, 10), code=st.sampled_from(["unavailable", "full", "invalid"]))
    def give_up(self, number: int, which: int, code: str) -> None:
        engine = self.engines[number]
        if not engine.connected or not engine.holds:
            return
        key = list(engine.holds)[which % len(engine.holds)]
        error: QuireError = {
            "unavailable": UnavailableError("draining"),
            "full": OverloadedError("full"),
            "invalid": InvalidRequestError("bad", field="sampling"),
        }[code]
        asked = self.asked_of(engine.holds.pop(key))
        if asked is not None and (code != "unavailable" or asked.vain >= MAX_MOVES):
            asked.excuses.add(error.code)
        update = Update(key, finished=Finished(FinishReason.ERROR, error))
        self.do(lambda: self.router.engine_stepped(engine.endpoint, [update]))

    @rule(
        number=engines, fault=st.sampled_from(["die", "die", "die", "stall", "drain", "load", "nonsense", "withdraw"])
    )
    def fault(self, number: int, fault: str) -> None:
        engine = self.engines[number]
        if fault == "withdraw":
            self.do(lambda: self.router.withdraw_engine(engine.endpoint))
            assert engine.endpoint.unused.is_set() == (not engine.endpoint.flights)
        if not engine.connected:
            return
        match fault:
            case "die":
                self.lose(number)
            case "stall":
                engine.endpoint.stall()
                self.lose(number)
            case "drain":
                self.do(lambda: self.router.engine_draining(engine.endpoint))
            case "load":
                self.report(number, 0, Phase.LOADING)
            case "nonsense":
                self.do(lambda: self.router.engine_stepped(engine.endpoint, [Update(10**6, (1, 2))]))

    @rule(number=engines)
    def heal(self, number: int) -> None:
        endpoint = self.engines[number].endpoint
        if endpoint.withdrawn and endpoint.unused.is_set():
            self.lose(number)
            self.do(lambda: self.router.remove_engine(endpoint))
            self.engines[number] = Engine(self.router.add_engine(f"engine-{number}"), self.sent)
        elif endpoint.withdrawn:
            self.do(lambda: self.router.restore_engine(endpoint))
        self.connect(number)
        self.report(number, 0, Phase.READY)

    @rule(number=engines, queued=st.integers(0, 5000))
    def get_busy(self, number: int, queued: int) -> None:
        self.report(number, queued, Phase.READY)

    def connect(self, number: int) -> None:
        engine = self.engines[number]
        if not engine.connected:
            engine.connected = True
            engine.holds, engine.position, engine.cancels = {}, {}, []
            self.do(
                lambda: self.router.engine_connected(
                    engine.endpoint, engine, name=f"engine-{number}", model=MODEL, max_num_seqs=4
                )
            )

    def lose(self, number: int) -> None:
        engine = self.engines[number]
        if engine.connected:
            # Those that it holds may have been moved in vain too often.
            for request in engine.holds.values():
                asked = self.asked_of(request)
                if asked is not None and asked.vain >= MAX_MOVES:
                    asked.excuses.add(ErrorCode.UNAVAILABLE)
        engine.connected = False
        self.do(lambda: self.router.engine_lost(engine.endpoint, "test"))

    def report(self, number: int, queued: int, phase: Phase) -> None:
        engine = self.engines[number]
        if engine.connected:
            engine.steps += 1
            load = replace(
                NO_LOAD, running=len(engine.holds), pending_prefill_tokens=queued, phase=phase, steps=engine.steps,
                prefill_tokens_per_second=1000.0, decode_step_seconds=0.01, pages_total=100, pages_available=50,
            )  # fmt: skip
            self.do(lambda: self.router.engine_reported(engine.endpoint, load))

    # Time

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds: float) -> None:
        for asked in self.everybody:
            # What is held for too long ends so; how long each has been is the core's affair.
            if not asked.ends and not any(engine.connected and self.holds(engine, asked) for engine in self.engines):
                asked.excuses.add(ErrorCode.UNAVAILABLE)
        self.clock.now += seconds
        self.do(lambda: None)

    def holds(self, engine: Engine, asked: Asked) -> bool:
        return any(request.request_id == asked.request.request_id for request in engine.holds.values())

    def asked_of(self, request: Request) -> Asked | None:
        return next((asked for asked in self.everybody if asked.request.request_id == request.request_id), None)

    def teardown(self) -> None:
        """Everything gets well again; then every request that somebody waits for must end, and nothing be left."""
        if not hasattr(self, "router"):
            self.clock.close()
            return
        for number in range(NUM_ENGINES):
            self.lose(number)
            self.heal(number)
        for _ in range(4):
            self.wait(3.0)
            for number, engine in enumerate(self.engines):
                while engine.holds or engine.cancels:
                    self.step(number, 100)
        for gateway in self.gateways:
            for asked in gateway.asked.values():
                assert len(asked.ends) == 1, "a request without an end"
        self.do(lambda: None)
        self.nothing_is_left()
        # Only the budget's own timer may run on, and it ends by itself.
        assert len([handle for handle in self.clock._scheduled if not handle.cancelled()]) <= 1  # type: ignore[attr-defined]
        idle: Awaitable[None] = asyncio.wait_for(self.router.until_idle(), 1)
        self.clock.run_until_complete(idle)
        for gateway in self.gateways:
            self.do(lambda gateway=gateway: self.router.leave(gateway.peer))
        self.clock.now += 100
        self.clock.turn()
        assert not self.failures
        assert not asyncio.all_tasks(self.clock)
        self.clock.close()

    def nothing_is_left(self) -> None:
        assert not any(gateway.peer.flights for gateway in self.gateways)
        assert self.metrics.registry.get_sample_value("quire_router_held_requests") == 0
        for endpoint in self.router.fleet.endpoints:
            assert not endpoint.flights and not endpoint.in_progress
            assert endpoint.view.waiting == 0 and endpoint._unreported_tokens == 0
        requests = self.metrics.registry.collect()
        ended = sum(
            sample.value for family in requests if family.name == "quire_router_requests" for sample in family.samples
            if sample.name.endswith("_total")
        )  # fmt: skip
        assert ended == len(self.everybody)


def test_every_request_gets_its_tokens_once_and_one_end() -> None:
    """The one promise of the router, under any order of faults."""
    run_state_machine_as_test(CoreMachine, settings=settings(max_examples=250, stateful_step_count=50, deadline=None))

"""One engine as `quire top` sees it: asked again and again, through its loading, its loss and its return."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import Enum

import grpc

from quire.cli.history import History
from quire.service.peer_tls import Dialer
from quire.v1 import engine_pb2, engine_pb2_grpc

# More cells than a terminal has; the view merges them.
_REQUEST = engine_pb2.InspectRequest(max_cells=4096, max_sequences=256)

# An engine answers between two steps, and a step of a long prompt on a slow CPU takes seconds.
_PATIENCE_SECONDS = 30.0

# An engine that is started again is found again within a second.
_CHANNEL_OPTIONS = (
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_STATES = {
    engine_pb2.ENGINE_PHASE_LOADING: "LOADING",
    engine_pb2.ENGINE_PHASE_READY: "READY",
    engine_pb2.ENGINE_PHASE_DRAINING: "DRAINING",
    engine_pb2.ENGINE_PHASE_FAILED: "FAILED",
}


class State(Enum):
    """How an engine is, as far as one can tell from here."""

    CONNECTING = "connecting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    LOST = "lost"


class EngineWatch:
    """What is known of the engine at `address`; `url` is that of the `quire serve` it belongs to, if to one.

    `dialer` makes the channel.
    """

    def __init__(
        self,
        address: str,
        url: str = "",
        clock: Callable[[], float] = time.monotonic,
        dialer: Dialer | None = None,
    ) -> None:
        self.address = address
        self.url = url
        self.name = address
        self.state = State.CONNECTING
        # Why there is no answer, in gRPC's words; empty if there is one.
        self.problem = ""
        self.seen = engine_pb2.InspectResponse()
        self.history = History()
        self._dialer = dialer or Dialer()
        self._clock = clock
        self._since = clock()
        self._asked_at: float | None = None

    @property
    def steps(self) -> bool:
        """Whether the engine has pages and a batch to show."""
        return self.state in (State.READY, State.DRAINING)

    @property
    def seconds_in_state(self) -> float:
        """How long it has been as it is."""
        return self._clock() - self._since

    @property
    def seconds_unanswered(self) -> float:
        """For how long it has been asked without an answer."""
        return 0.0 if self._asked_at is None else self._clock() - self._asked_at

    async def follow(self, interval: float, changed: Callable[[], None]) -> None:
        """Asks every `interval` seconds until it is cancelled; calls `changed` after each answer."""
        async with self._dialer.channel(self.address, _CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            while True:
                await self._ask(stub)
                changed()
                await asyncio.sleep(interval)

    async def look(self, interval: float) -> None:
        """Asks twice, `interval` seconds apart, as far as it answers: speeds take two looks."""
        async with self._dialer.channel(self.address, _CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            await self._ask(stub)
            if self.steps:
                await asyncio.sleep(interval)
                await self._ask(stub)

    async def _ask(self, stub: engine_pb2_grpc.EngineServiceAsyncStub) -> None:
        self.ask()
        try:
            answer = await stub.Inspect(_REQUEST, timeout=_PATIENCE_SECONDS)
        except grpc.aio.AioRpcError as error:
            self._lose(error)
        else:
            self.take(answer)

    def ask(self) -> None:
        """It is asked now."""
        self._asked_at = self._clock()

    def take(self, answer: engine_pb2.InspectResponse) -> None:
        """The engine has answered."""
        self.seen = answer
        self._asked_at = None
        self.problem = ""
        self.name = answer.status.engine or self.address
        self._enter(State[_STATES.get(answer.status.phase, "CONNECTING")])
        if self.steps:
            self.history.add(self._clock(), answer.status.epoch, answer.stats)

    def _lose(self, error: grpc.aio.AioRpcError) -> None:
        self._asked_at = None
        self._enter(State.CONNECTING if self.state is State.CONNECTING else State.LOST)
        match error.code():
            case grpc.StatusCode.UNIMPLEMENTED:
                self.problem = "what listens there is no engine, or an older one: give an engine's --listen address"
            case grpc.StatusCode.UNAVAILABLE:
                connecting = self.state is State.CONNECTING
                self.problem = _unreachable(error.details() or "") if connecting else "no answer"
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                self.problem = f"no answer within {_PATIENCE_SECONDS:g} s: its step takes longer, or it hangs"
            case code:
                self.problem = f"{code.name}: {error.details()}"

    def _enter(self, state: State) -> None:
        if state is not self.state:
            self.state, self._since = state, self._clock()


def _unreachable(details: str) -> str:
    """Why, as far as gRPC's `details` tell: a server and a client that disagree about TLS mostly just hang up."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "no certificate that --engine-tls-ca has signed"
    if "Hostname Verification" in details:
        return "no certificate for this address (--engine-tls-name says another)"
    if "Socket closed" in details:
        return "no answer (over TLS: --engine-tls-ca, --engine-tls-cert)"
    return "no answer"

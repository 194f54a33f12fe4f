"""What the router knows of one engine: its session, its pages, its load, what it was sent.

Written by the engine's link and the core, read by the core's choice.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from quire.router.canary import Canary
from quire.router.cost import EngineView
from quire.router.flight import Flight
from quire.router.index import CacheReplica, PagesInProgress, PrefixIndex
from quire.service.request import Request


class Phase(Enum):
    """The values are the names of `quire.v1.EnginePhase` without their prefix."""

    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


class EngineSession(Protocol):
    """The way to an engine while it is connected."""

    def submit(self, key: int, request: Request) -> None:
        """Sends a request under a key of its own."""

    def cancel(self, key: int) -> None:
        """Takes it back."""


@dataclass(frozen=True, slots=True)
class Load:
    """An engine's load report, as in `quire.v1.WatchLoadResponse`."""

    running: int
    waiting: int
    pending_prefill_tokens: int
    pages_total: int
    pages_available: int
    prefill_tokens_per_second: float
    decode_step_seconds: float
    phase: Phase
    steps: int = 0
    cache_sequence: int = 0
    decode_tokens_per_step: float = 0.0


NO_LOAD = Load(0, 0, 0, 0, 0, 0.0, 0.0, Phase.READY)


@dataclass(slots=True)
class _Unreported:
    tokens: int
    # It is part of every report from this one on.
    included_in: int


class Endpoint:
    """One engine, whether it is there or not.

    `name` and `model` are the engine's own, known since its first welcome. `flights` are the requests that it holds,
    by the key they have on its session; keys are never used twice, not even on another session. `withdrawn` says that
    it is not among the router's engines any more; it is `unused` once it has nothing in flight, too. `canary` says that
    it is on trial.
    """

    def __init__(self, address: str, index: PrefixIndex) -> None:
        self.address = address
        self.name = address
        self.model = ""
        self.cache = CacheReplica(index)
        self.in_progress = PagesInProgress()
        self.flights: dict[int, Flight] = {}
        self.view = EngineView()
        self.withdrawn = False
        self.canary: Canary | None = None
        self.unused = asyncio.Event()
        self._session: EngineSession | None = None
        self._draining = False
        self._max_num_seqs = 0
        self._load = NO_LOAD
        self._reports = 0
        # Requests sent that the last report may not include, and what they add to it.
        self._unreported: dict[Flight, _Unreported] = {}
        self._unreported_tokens = 0
        self._progressed_at = time.monotonic()
        # The step at which it was found stalled, until it is seen at another.
        self._stalled_at: int | None = None
        self._keys = itertools.count(1)

    @property
    def routable(self) -> bool:
        """Whether it takes new requests."""
        there = self._session is not None and not self.withdrawn and not self._draining
        return there and self._stalled_at is None and self._load.phase is Phase.READY

    @property
    def prefill_tokens_per_second(self) -> float:
        """As it has learned, 0 before that."""
        return self._load.prefill_tokens_per_second

    @property
    def revision(self) -> str:
        """Which engines on trial it belongs to, empty if to none."""
        return self.canary.revision if self.canary else ""

    @property
    def state(self) -> str:
        """For messages: why it is not routable, or "ready"."""
        if self._session is None:
            return "not connected"
        if self._stalled_at is not None:
            return "stalled"
        if self.withdrawn:
            return "withdrawn"
        return "draining" if self._draining else self._load.phase.value.lower()

    @property
    def cache_lag(self) -> int:
        """How many of its cache events have not been applied, as of its last report."""
        return max(0, self._load.cache_sequence - self.cache.sequence)

    def connected(self, session: EngineSession, *, name: str, model: str, max_num_seqs: int) -> None:
        """The engine said welcome. `max_num_seqs` 0 is not known."""
        self._session = session
        self.name, self.model = name, model
        self._max_num_seqs = max_num_seqs
        self.progressed()
        self._refresh()

    def disconnected(self) -> list[Flight]:
        """The session is over: forgets load and pages, and hands back the requests that the engine held."""
        flights = list(self.flights.values())
        for flight in flights:
            self.release(flight)
        self._session, self._load, self._draining = None, NO_LOAD, False
        self.cache.forget()
        self._refresh()
        return flights

    def drains(self) -> None:
        """The engine wants no new requests."""
        self._draining = True

    def withdraw(self) -> None:
        """Takes it off the router's engines: what it has in flight goes on, and nothing comes to it."""
        self.withdrawn = True
        if not self.flights:
            self.unused.set()

    def restore(self) -> None:
        """It is one of the router's engines again."""
        self.withdrawn = False
        self.unused.clear()

    def progressed(self) -> None:
        """The engine has done something, or has just been given something to do."""
        self._progressed_at = time.monotonic()

    def idle_seconds(self) -> float:
        """For how long it has done nothing although it has work; 0 if it has none."""
        return time.monotonic() - self._progressed_at if self.flights else 0.0

    def stall(self) -> None:
        """It does nothing although it has work: nothing comes to it until it is seen to step, or to have no work."""
        self._stalled_at = self._load.steps

    def report(self, load: Load) -> None:
        """The engine's load. It may have left before the request sent last came in; the next one can't have."""
        if load.steps != self._load.steps:
            self.progressed()
        if load.steps != self._stalled_at or not load.running + load.waiting:
            self._stalled_at = None
        self._load = load
        self._reports += 1
        for flight, sent in list(self._unreported.items()):
            if sent.included_in <= self._reports:
                self._reported(flight)
        self._refresh()

    def send(self, flight: Flight, request: Request, page_keys: list[int], uncached_tokens: int) -> None:
        """Submits a request; it counts here until `release`."""
        if self._session is None:
            raise RuntimeError(f"engine {self.name} is not connected")
        if not self.flights:
            self.progressed()
        flight.endpoint, flight.engine_key, flight.page_keys = self, next(self._keys), page_keys
        self.flights[flight.engine_key] = flight
        self.in_progress.add(page_keys)
        self._unreported[flight] = _Unreported(uncached_tokens, self._reports + 2)
        self._unreported_tokens += uncached_tokens
        self._refresh()
        self._session.submit(flight.engine_key, request)

    def cancel(self, flight: Flight) -> None:
        """Asks the engine to end a request."""
        if self._session is not None:
            self._session.cancel(flight.engine_key)

    def progress(self, flight: Flight, *, has_tokens: bool) -> None:
        """The engine has scheduled the request: its next report includes it. With a token nothing is left to report."""
        if (sent := self._unreported.get(flight)) is not None:
            sent.included_in = self._reports + 1
            if has_tokens:
                self._reported(flight)
                self._refresh()

    def release(self, flight: Flight) -> None:
        """The engine holds it no more."""
        del self.flights[flight.engine_key]
        self.in_progress.remove(flight.page_keys)
        self._reported(flight)
        self._refresh()
        flight.endpoint, flight.page_keys = None, ()
        if self.withdrawn and not self.flights:
            self.unused.set()

    def _reported(self, flight: Flight) -> None:
        if (sent := self._unreported.pop(flight, None)) is not None:
            self._unreported_tokens -= sent.tokens

    def _refresh(self) -> None:
        load = self._load
        self.view = EngineView(
            running=load.running,
            waiting=load.waiting + len(self._unreported),
            pending_prefill_tokens=load.pending_prefill_tokens + self._unreported_tokens,
            pages_total=load.pages_total,
            pages_available=load.pages_available,
            max_num_seqs=self._max_num_seqs,
            prefill_tokens_per_second=load.prefill_tokens_per_second,
            decode_step_seconds=load.decode_step_seconds,
            decode_tokens_per_step=load.decode_tokens_per_step,
        )

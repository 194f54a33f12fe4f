"""The router's core: requests in flight, the choice of an engine, moves, cancellation. Knows no gRPC.

Gateways' sessions (`server`) call submit, cancel and leave; the engines' links (`links`, `link`) call the engine_…
methods; both get updates and requests handed to them. Everything runs on one event loop, and every request that is
submitted ends with exactly one terminal event, unless its gateway has left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from opentelemetry.trace import Tracer

from quire.router.budget import RetryBudget
from quire.router.endpoint import Endpoint, EngineSession, Load
from quire.router.fleet import Fleet
from quire.router.flight import Flight, Peer
from quire.router.index import page_keys
from quire.router.metrics import RouterMetrics
from quire.router.observation import RequestObserver
from quire.router.waiting import WaitingRoom
from quire.service.errors import (
    DeadlineExceededError,
    ErrorCode,
    InvalidRequestError,
    NotFoundError,
    QuireError,
    UnavailableError,
)
from quire.service.pages import prefix_hashes
from quire.service.request import Finished, FinishReason, Request, Update
from quire.service.tracing import trace_context

# Errors that say nothing against the request: another engine may take it.
_ANOTHER_MAY = frozenset((ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED))

# The hint of an error that says no engine is ready: about as long as a process takes to come back, in seconds.
_RETRY_AFTER = 5.0

# What one event means for the gateways: one frame for each.
_Frames = dict[Peer, list[Update]]


class Router:
    """All requests of all gateways on all engines.

    `hold` is how many seconds a request waits for an engine when none is ready, `max_moves` how often it may be moved
    without a token in between, `retry_share` the share of the requests in flight that may be moved at a time.
    `ready_without_engines`: requests are wanted also then, since their waiting is what starts an engine.
    """

    def __init__(
        self,
        *,
        hold: float,
        max_moves: int,
        retry_share: float,
        tracer: Tracer,
        metrics: RouterMetrics,
        ready_without_engines: bool = False,
    ) -> None:
        self.fleet = Fleet()
        # Set whenever `ready` may have changed.
        self.changed = asyncio.Event()
        self.changed.set()
        self._ready_without_engines = ready_without_engines
        self._max_moves = max_moves
        self._budget = RetryBudget(retry_share)
        self._observer = RequestObserver(tracer, metrics)
        self._peers: dict[Peer, None] = {}
        self._waiting = WaitingRoom(hold, expire=self._hold_over, wake=self._dispatch_waiting)
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.observe(self.fleet, held=lambda: len(self._waiting))

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would go to an engine at once, or is wanted without one."""
        return not self._draining and (self._ready_without_engines or self.fleet.ready)

    @property
    def draining(self) -> bool:
        """Whether the router wants no new requests."""
        return self._draining

    # What gateways do

    def join(self, peer: Peer) -> None:
        """A gateway opened a session."""
        self._peers[peer] = None

    def leave(self, peer: Peer) -> None:
        """A gateway's session is over: its requests are cancelled, and nobody is told."""
        del self._peers[peer]
        for flight in list(peer.flights.values()):
            if flight.endpoint is not None:
                flight.endpoint.cancel(flight)
            self._end(flight, Finished(FinishReason.CANCELLED))

    def submit(self, peer: Peer, key: int, request: Request) -> None:
        """Sends a request to the best engine, or holds it until there is one."""
        if key in peer.flights:
            self.refuse(peer, key, InvalidRequestError(f"key {key} is in use: choose another", field="key"))
            return
        if self._draining:
            self.refuse(peer, key, UnavailableError("the router is shutting down: send the request to another"))
            return
        span = self._observer.submitted(request)
        request = replace(request, trace=trace_context(span))
        flight = Flight(peer, key, request, span, list(request.output_token_ids), _now())
        peer.flights[key] = flight
        self._in_flight += 1
        self._idle.clear()
        frames: _Frames = {}
        self._dispatch(flight, frames)
        _deliver(frames)

    def refuse(self, peer: Peer, key: int, error: QuireError) -> None:
        """Ends a submission that never became a request."""
        finished = Finished(FinishReason.ERROR, error)
        self._observer.refused(finished)
        peer.deliver([Update(key, finished=finished)])

    def cancel(self, peer: Peer, key: int) -> None:
        """Ends a request; its terminal event still comes. An unknown key is no error: the two may have crossed."""
        flight = peer.flights.get(key)
        if flight is None:
            return
        flight.cancelled = True
        if flight.endpoint is not None:
            flight.endpoint.cancel(flight)
        else:
            self._finish_now(flight, Finished(FinishReason.CANCELLED))

    # What engines do

    def add_engine(self, address: str) -> Endpoint:
        """There is an engine at `address`; it is not connected yet."""
        self.changed.set()
        return self.fleet.add(address)

    def withdraw_engine(self, endpoint: Endpoint) -> None:
        """An engine is not among the router's any more: what it has in flight goes on there."""
        endpoint.withdraw()
        self.changed.set()

    def restore_engine(self, endpoint: Endpoint) -> None:
        """An engine that was withdrawn is back before it was removed."""
        endpoint.restore()
        self._engine_changed()

    def remove_engine(self, endpoint: Endpoint) -> None:
        """A withdrawn engine is lost, too: nothing of it is left."""
        self.fleet.remove(endpoint)
        self.changed.set()

    def engine_connected(
        self, endpoint: Endpoint, session: EngineSession, *, name: str, model: str, max_num_seqs: int
    ) -> None:
        """An engine said welcome."""
        endpoint.connected(session, name=name, model=model, max_num_seqs=max_num_seqs)
        self._engine_changed()

    def engine_lost(self, endpoint: Endpoint, reason: str) -> None:
        """An engine's session is over: what it held goes on elsewhere."""
        flights = endpoint.disconnected()
        self.changed.set()
        error = UnavailableError(f"engine {endpoint.name} was lost: {reason}", retry_after=_RETRY_AFTER)
        frames: _Frames = {}
        for flight in flights:
            finished = self._after_loss(flight, endpoint, error)
            if finished is not None:
                self._finish(flight, finished, frames)
            else:
                self._move(flight, endpoint, error, frames)
        _deliver(frames)

    def engine_draining(self, endpoint: Endpoint) -> None:
        """An engine wants no new requests."""
        endpoint.drains()
        self._engine_changed()

    def engine_reported(self, endpoint: Endpoint, load: Load) -> None:
        """An engine's load report."""
        was_routable = endpoint.routable
        endpoint.report(load)
        self.fleet.learn_speeds()
        if endpoint.routable != was_routable:
            self._engine_changed()

    def engine_stepped(self, endpoint: Endpoint, updates: Sequence[Update]) -> None:
        """One engine frame becomes one frame for each gateway that has a request in it.

        Keys that are not known here are of requests whose gateway left, or whose terminal event has come.
        """
        endpoint.progressed()
        frames: _Frames = {}
        for update in updates:
            flight = endpoint.flights.get(update.key)
            if flight is not None:
                self._progress(flight, endpoint, update, frames)
        _deliver(frames)

    # The end of the router

    def drain(self) -> None:
        """Takes no new requests and tells the gateways so."""
        self._draining = True
        for peer in self._peers:
            peer.announce_drain()
        self.changed.set()

    async def until_idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    def end_all(self, error: QuireError) -> int:
        """Ends every request with `error`; returns how many that were."""
        frames: _Frames = {}
        flights = [flight for peer in self._peers for flight in peer.flights.values()]
        for flight in flights:
            if flight.endpoint is not None:
                flight.endpoint.cancel(flight)
            self._finish(flight, Finished(FinishReason.ERROR, error), frames)
        _deliver(frames)
        return len(flights)

    # One request

    def _dispatch(self, flight: Flight, frames: _Frames) -> None:
        now = _now()
        if flight.moving and not self._budget.allows(now, self._in_flight):
            self._hold(flight, frames)
            self._waiting.wake_at(self._budget.next_turn(now))
            return
        tokens = (*flight.request.prompt_token_ids, *flight.tokens)
        pages = page_keys(b"".join(prefix_hashes(flight.request.cache_key, tokens)))
        began = time.perf_counter()
        choice = self.fleet.choose(flight.request.model, pages, len(tokens), flight.left)
        if choice is None:
            self._hold(flight, frames)
            return
        if flight.moving:
            flight.moving = False
            self._budget.spend(now)
        self._observer.dispatched(flight, choice, time.perf_counter() - began, now)
        self._waiting.leave(flight)
        request = replace(flight.request, output_token_ids=tuple(flight.tokens))
        choice.endpoint.send(flight, request, pages, len(tokens) - choice.matched_tokens)

    def _hold(self, flight: Flight, frames: _Frames) -> None:
        model = flight.request.model
        if self.fleet.ready and model not in self.fleet.models:
            self._finish(flight, Finished(FinishReason.ERROR, self._not_found(model)), frames)
        else:
            self._waiting.enter(flight)

    def _hold_over(self, flight: Flight, deadline_passed: bool) -> None:
        model = flight.request.model
        if deadline_passed:
            error: QuireError = DeadlineExceededError(
                f"the deadline passed before an engine was ready: {self.fleet.states}", field="deadline_unix_ms"
            )
        elif self.fleet.ready and model not in self.fleet.models:
            error = self._not_found(model)
        elif self.fleet.ready_for(model):
            error = UnavailableError("too many requests wait for another engine at once", retry_after=_RETRY_AFTER)
        else:
            error = UnavailableError(f"no engine is ready: {self.fleet.states}", retry_after=_RETRY_AFTER)
        self._finish_now(flight, Finished(FinishReason.ERROR, error))

    def _not_found(self, model: str) -> NotFoundError:
        served = ", ".join(self.fleet.models)
        return NotFoundError(f"model {model} is not served here: the engines run {served}", field="model")

    def _progress(self, flight: Flight, endpoint: Endpoint, update: Update, frames: _Frames) -> None:
        if update.token_ids:
            flight.advance(update.token_ids)
            if flight.first_token_at is None:
                self._observer.first_token(flight, _now())
        endpoint.progress(flight, has_tokens=bool(update.token_ids))
        if update.started is None and update.finished is None:
            # All but the first and the last of a request's tokens: as little as can be.
            _, tokens, _, _, logprobs, prompt_logprobs, drafts = update
            news = Update(flight.key, tokens, None, None, logprobs, prompt_logprobs, drafts)
            frames.setdefault(flight.peer, []).append(news)
            return
        started = None
        if update.started is not None and not flight.started:
            started, flight.started = update.started, True
            self._observer.started(flight, endpoint, started)
        finished = update.finished
        error = finished.error if finished is not None else None
        if error is not None and error.code in _ANOTHER_MAY:
            finished = self._after_loss(flight, endpoint, error)
        news = update._replace(key=flight.key, started=started, finished=finished)
        if news != Update(flight.key):
            frames.setdefault(flight.peer, []).append(news)
        if finished is not None:
            self._end(flight, finished)
        elif error is not None:
            self._move(flight, endpoint, error, frames)

    def _after_loss(self, flight: Flight, endpoint: Endpoint, error: QuireError) -> Finished | None:
        """How a request ends that `endpoint` gave up or was lost with; None if it is to go on elsewhere."""
        if flight.cancelled:
            return Finished(FinishReason.CANCELLED)
        if (over := flight.already_over()) is not None:
            return over
        flight.left.add(endpoint)
        if flight.fruitless_moves >= self._max_moves:
            return Finished(FinishReason.ERROR, error)
        # A queue is full for a while: waiting for it is the client's choice, another engine's queue may have room now.
        if error.code is ErrorCode.RESOURCE_EXHAUSTED and not self._worth_a_try(flight):
            return Finished(FinishReason.ERROR, error)
        return None

    def _worth_a_try(self, flight: Flight) -> bool:
        """Whether a request that a full queue refused goes to another engine, rather than back to the client."""
        untried = not flight.left.issuperset(self.fleet.ready_for(flight.request.model))
        return untried and self._budget.allows(_now(), self._in_flight)

    def _move(self, flight: Flight, endpoint: Endpoint, error: QuireError, frames: _Frames) -> None:
        if flight.endpoint is not None:
            endpoint.release(flight)
        flight.moves += 1
        flight.fruitless_moves += 1
        flight.moving = True
        self._observer.moved(flight, endpoint, error)
        self._dispatch(flight, frames)

    def _finish(self, flight: Flight, finished: Finished, frames: _Frames) -> None:
        frames.setdefault(flight.peer, []).append(Update(flight.key, finished=finished))
        self._end(flight, finished)

    def _finish_now(self, flight: Flight, finished: Finished) -> None:
        frames: _Frames = {}
        self._finish(flight, finished, frames)
        _deliver(frames)

    def _end(self, flight: Flight, finished: Finished) -> None:
        """Forgets a request, wherever it is."""
        del flight.peer.flights[flight.key]
        if flight.endpoint is not None:
            flight.endpoint.release(flight)
        self._waiting.leave(flight)
        if finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.fleet.learn_output(len(flight.tokens))
        self._observer.ended(flight, finished, _now())
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    # All engines

    def _engine_changed(self) -> None:
        self.changed.set()
        if self.fleet.ready:
            self._dispatch_waiting()

    def _dispatch_waiting(self) -> None:
        frames: _Frames = {}
        for flight in self._waiting.take_all():
            self._dispatch(flight, frames)
        _deliver(frames)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _deliver(frames: _Frames) -> None:
    for peer, updates in frames.items():
        peer.deliver(updates)

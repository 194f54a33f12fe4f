"""The router's core: requests in flight, the choice of an engine, moves, cancellation. Knows no gRPC.

Gateways' sessions (`server`) call submit, cancel and leave; the engines' links (`link`) call the engine_… methods; both
get updates and requests handed to them. Everything runs on one event loop, and every request that is submitted ends
with exactly one terminal event, unless its gateway has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from opentelemetry.trace import SpanKind, StatusCode, Tracer

from quire.router.endpoint import Endpoint, EngineSession, Load
from quire.router.fleet import Fleet
from quire.router.flight import Flight, Peer
from quire.router.index import page_keys
from quire.router.metrics import RouterMetrics
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
from quire.service.tracing import parent_context, trace_context

# Errors that say nothing against the request: another engine may take it.
_ANOTHER_MAY = frozenset((ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED))

# What one event means for the gateways: one frame for each.
_Frames = dict[Peer, list[Update]]

logger = logging.getLogger(__name__)


class Router:
    """All requests of all gateways on all engines.

    `hold` is how many seconds a request waits for an engine when none is ready, `max_moves` how often it may be moved.
    """

    def __init__(
        self, engines: Sequence[str], *, hold: float, max_moves: int, tracer: Tracer, metrics: RouterMetrics
    ) -> None:
        self.fleet = Fleet(engines)
        # Set whenever `ready` may have changed.
        self.changed = asyncio.Event()
        self._hold_seconds = hold
        self._max_moves = max_moves
        self._tracer = tracer
        self._metrics = metrics
        self._peers: dict[Peer, None] = {}
        self._held: dict[Flight, None] = {}
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        metrics.observe(self.fleet, held=lambda: len(self._held))

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would go to an engine at once."""
        return not self._draining and self.fleet.ready

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
        span = self._tracer.start_span(
            "route",
            context=parent_context(request.trace),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.model": request.model,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "quire.request_id": request.request_id,
            },
        )
        flight = Flight(peer, key, replace(request, trace=trace_context(span)), span, list(request.output_token_ids))
        peer.flights[key] = flight
        self._in_flight += 1
        self._idle.clear()
        frames: _Frames = {}
        self._dispatch(flight, frames)
        _deliver(frames)

    def refuse(self, peer: Peer, key: int, error: QuireError) -> None:
        """Ends a submission that never became a request."""
        finished = Finished(FinishReason.ERROR, error)
        self._metrics.finished(finished)
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
        error = UnavailableError(f"engine {endpoint.name} was lost: {reason}")
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
        tokens = (*flight.request.prompt_token_ids, *flight.tokens)
        pages = page_keys(b"".join(prefix_hashes(flight.request.cache_key, tokens)))
        began = time.perf_counter()
        choice = self.fleet.choose(flight.request.model, pages, len(tokens), flight.left)
        if choice is None:
            self._hold(flight, frames)
            return
        self._metrics.chosen(time.perf_counter() - began, choice.matched_tokens)
        _stop_timer(flight)
        flight.span.set_attributes(
            {
                "quire.engine": choice.endpoint.name,
                "quire.matched_tokens": choice.matched_tokens,
                "quire.expected_ttft_seconds": choice.expected_ttft,
                "quire.moves": flight.moves,
            }
        )
        request = replace(flight.request, output_token_ids=tuple(flight.tokens))
        choice.endpoint.send(flight, request, pages, len(tokens) - choice.matched_tokens)

    def _hold(self, flight: Flight, frames: _Frames) -> None:
        request = flight.request
        if self.fleet.ready and request.model not in self.fleet.models:
            self._finish(flight, Finished(FinishReason.ERROR, self._not_found(request.model)), frames)
            return
        self._held[flight] = None
        if flight.timer is None:
            until_deadline = float("inf")
            if request.deadline_unix_ms is not None:
                until_deadline = max(0.0, request.deadline_unix_ms / 1000 - time.time())
            flight.timer = asyncio.get_running_loop().call_later(
                min(self._hold_seconds, until_deadline), self._hold_over, flight, until_deadline <= self._hold_seconds
            )

    def _hold_over(self, flight: Flight, deadline_passed: bool) -> None:
        if deadline_passed:
            error: QuireError = DeadlineExceededError(
                f"the deadline passed before an engine was ready: {self.fleet.states}", field="deadline_unix_ms"
            )
        elif self.fleet.ready:
            error = self._not_found(flight.request.model)
        else:
            error = UnavailableError(f"no engine is ready: {self.fleet.states}")
        self._finish_now(flight, Finished(FinishReason.ERROR, error))

    def _not_found(self, model: str) -> NotFoundError:
        served = ", ".join(self.fleet.models)
        return NotFoundError(f"model {model} is not served here: the engines run {served}", field="model")

    def _progress(self, flight: Flight, endpoint: Endpoint, update: Update, frames: _Frames) -> None:
        flight.tokens.extend(update.token_ids)
        endpoint.progress(flight, has_tokens=bool(update.token_ids))
        started = None
        if update.started is not None and not flight.started:
            started, flight.started = update.started, True
            self._metrics.started(len(flight.request.prompt_token_ids), started.cached_tokens)
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
        if flight.moves == self._max_moves:
            return Finished(FinishReason.ERROR, error)
        # A queue is full for a while: waiting for it is the client's choice, another engine's queue may have room now.
        full = error.code is ErrorCode.RESOURCE_EXHAUSTED
        if full and flight.left.issuperset(self.fleet.ready_for(flight.request.model)):
            return Finished(FinishReason.ERROR, error)
        return None

    def _move(self, flight: Flight, endpoint: Endpoint, error: QuireError, frames: _Frames) -> None:
        if flight.endpoint is not None:
            endpoint.release(flight)
        flight.moves += 1
        self._metrics.moved(endpoint)
        flight.span.add_event("moved", {"quire.engine": endpoint.name, "error.type": error.code.value})
        logger.debug(
            "request moves on: %s",
            error.message,
            extra={"request_id": flight.request.request_id, "engine": endpoint.name, "tokens": len(flight.tokens)},
        )
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
        self._held.pop(flight, None)
        _stop_timer(flight)
        if finished.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.fleet.learn_output(len(flight.tokens))
        self._metrics.finished(finished)
        _end_span(flight, finished)
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    # All engines

    def _engine_changed(self) -> None:
        self.changed.set()
        if not self.fleet.ready:
            return
        frames: _Frames = {}
        held, self._held = self._held, {}
        for flight in held:
            self._dispatch(flight, frames)
        _deliver(frames)


def _deliver(frames: _Frames) -> None:
    for peer, updates in frames.items():
        peer.deliver(updates)


def _stop_timer(flight: Flight) -> None:
    if flight.timer is not None:
        flight.timer.cancel()
        flight.timer = None


def _end_span(flight: Flight, finished: Finished) -> None:
    span = flight.span
    span.set_attributes(
        {
            "quire.moves": flight.moves,
            "gen_ai.usage.output_tokens": len(flight.tokens),
            "gen_ai.response.finish_reasons": [finished.reason.value.lower()],
        }
    )
    if finished.error is not None:
        span.set_attribute("error.type", finished.error.code.value)
        span.set_status(StatusCode.ERROR, finished.error.message)
    span.end()

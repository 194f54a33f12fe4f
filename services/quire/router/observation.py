"""What is told of each request: its span, its metrics, its one line in the log. The core calls it as things happen."""

from __future__ import annotations

import logging

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id

from quire.router.endpoint import Endpoint
from quire.router.fleet import Choice
from quire.router.flight import Flight
from quire.router.metrics import RouterMetrics
from quire.service.errors import ErrorCode, QuireError
from quire.service.logs import facts_of
from quire.service.request import Finished, Request, Started
from quire.service.tracing import parent_context

# Errors that say something against the engine, or how it was started; others are the request's own.
_ENGINES_FAULT = frozenset((ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.RESOURCE_EXHAUSTED))

logger = logging.getLogger(__name__)


class RequestObserver:
    """Tells of requests. Times are in seconds on the event loop's clock."""

    def __init__(self, tracer: Tracer, metrics: RouterMetrics) -> None:
        self._tracer = tracer
        self._metrics = metrics

    def submitted(self, request: Request) -> Span:
        """The span of a request that has come in; it stays the same however often the request is moved."""
        return self._tracer.start_span(
            "route",
            context=parent_context(request.trace),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.model": request.model,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "quire.request_id": request.request_id,
            },
        )

    def refused(self, finished: Finished) -> None:
        """A submission never became a request."""
        self._metrics.finished(finished)

    def dispatched(self, flight: Flight, choice: Choice, decision_seconds: float, now: float) -> None:
        """A request goes to an engine."""
        self._metrics.chosen(decision_seconds, choice.matched_tokens)
        if flight.held_at is not None:
            self._metrics.held(now - flight.held_at)
        flight.engine = choice.endpoint.name
        flight.revision = choice.endpoint.revision
        if flight.span.is_recording():
            flight.span.set_attributes(
                {
                    "quire.engine": choice.endpoint.name,
                    "quire.matched_tokens": choice.matched_tokens,
                    "quire.expected_ttft_seconds": choice.expected_ttft,
                    "quire.moves": flight.moves,
                }
            )

    def started(self, flight: Flight, endpoint: Endpoint, started: Started) -> None:
        """The first engine has begun with a request: what it had cached counts, once."""
        flight.cached_tokens = started.cached_tokens
        self._metrics.started(endpoint, len(flight.request.prompt_token_ids), started.cached_tokens)

    def first_token(self, flight: Flight, now: float) -> None:
        """The first token of a request has come."""
        flight.first_token_at = now
        self._metrics.first_token(now - flight.submitted_at)

    def moved(self, flight: Flight, endpoint: Endpoint, error: QuireError) -> None:
        """A request leaves an engine for another."""
        self._metrics.moved(endpoint, streaming=bool(flight.tokens))
        self._left(flight, failed=True)
        flight.span.add_event("moved", {"quire.engine": endpoint.name, "error.type": error.code.value})
        facts = {"request_id": flight.request.request_id, "engine": endpoint.name, "tokens": len(flight.tokens)}
        logger.debug("request moves on: %s", error.message, extra=facts)

    def ended(self, flight: Flight, finished: Finished, now: float) -> None:
        """A request has had its terminal event, or nobody waits for it any more."""
        self._metrics.finished(finished)
        self._left(flight, failed=finished.error is not None and finished.error.code in _ENGINES_FAULT)
        _end_span(flight, finished)
        request = flight.request
        facts: dict[str, object] = {
            "request_id": request.request_id,
            "trace_id": format_trace_id(flight.span.get_span_context().trace_id),
            "model": request.model,
            "engine": flight.engine,
            "reason": finished.reason.value.lower(),
            "prompt_tokens": len(request.prompt_token_ids),
            "cached_tokens": flight.cached_tokens,
            "output_tokens": len(flight.tokens),
            "moves": flight.moves,
            "seconds": round(now - flight.submitted_at, 4),
        }
        if flight.first_token_at is not None:
            facts["first_token_seconds"] = round(flight.first_token_at - flight.submitted_at, 4)
        if finished.error is not None:
            facts |= facts_of(finished.error)
        logger.info("request", extra=facts)

    def _left(self, flight: Flight, *, failed: bool) -> None:
        if flight.revision is not None:
            self._metrics.left_engine(flight.revision, failed=failed)
            flight.revision = None


def _end_span(flight: Flight, finished: Finished) -> None:
    span = flight.span
    if not span.is_recording():
        return
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

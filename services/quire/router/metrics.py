"""The router's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from quire.router.endpoint import Endpoint
from quire.router.fleet import Fleet
from quire.service.errors import ConfigError
from quire.service.request import Finished

# Seconds: from a short prompt on one engine to a long one on a hundred.
_DECISION_BUCKETS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class RouterMetrics:
    """One router's registry; `serve` exposes it over HTTP.

    Engines are labelled by their address, which is known before their name is.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that ended.", "reason", "code")
        self._moves = self._counter("moves", "Requests moved away from an engine.", "engine")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that engines started.")
        self._hit_tokens = self._counter("prefix_hit_tokens", "Those of them that the engine had cached.")
        self._expected_hit_tokens = self._counter(
            "expected_prefix_hit_tokens", "Prompt tokens that the chosen engines were expected to have cached."
        )
        self._cache_events = self._counter("cache_events", "Cache events applied.", "engine")
        self._cache_gaps = self._counter(
            "cache_gaps", "Times that events were missing and a snapshot was asked for.", "engine"
        )
        self._decision = Histogram(
            "quire_router_decision_seconds",
            "Time to choose an engine for a prompt that is hashed.",
            buckets=_DECISION_BUCKETS,
            registry=self.registry,
        )

    def serve(self, port: int) -> None:
        """Exposes the registry on `port`; 0 is off. Raises ConfigError."""
        if not port:
            return
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"can't serve metrics on port {port} ({error.strerror}): choose another") from error

    def observe(self, fleet: Fleet, *, held: Callable[[], int]) -> None:
        """Reads the gauges from these whenever they are asked for."""
        self._gauge("index_pages", "Distinct pages in the index.").set_function(partial(len, fleet.index))
        self._gauge("held_requests", "Requests that wait for an engine.").set_function(held)
        in_flight = self._gauge("in_flight_requests", "Requests at an engine.", "engine")
        ready = self._gauge("engine_ready", "1 if the engine takes requests.", "engine")
        sequence = self._gauge(
            "cache_sequence",
            "Last cache event applied; how far the index lags is the engine's own minus this.",
            "engine",
        )
        for endpoint in fleet.endpoints:
            in_flight.labels(endpoint.address).set_function(partial(_in_flight, endpoint))
            ready.labels(endpoint.address).set_function(partial(_ready, endpoint))
            sequence.labels(endpoint.address).set_function(partial(_sequence, endpoint))

    def chosen(self, seconds: float, expected_hit_tokens: int) -> None:
        """An engine was chosen for a request."""
        self._decision.observe(seconds)
        self._expected_hit_tokens.inc(expected_hit_tokens)

    def started(self, prompt_tokens: int, cached_tokens: int) -> None:
        """An engine began with a request."""
        self._prompt_tokens.inc(prompt_tokens)
        self._hit_tokens.inc(cached_tokens)

    def moved(self, endpoint: Endpoint) -> None:
        """A request leaves an engine for another."""
        self._moves.labels(endpoint.address).inc()

    def finished(self, finished: Finished) -> None:
        """A request ended."""
        code = finished.error.code.value if finished.error else ""
        self._requests.labels(finished.reason.value, code).inc()

    def cache_event(self, endpoint: Endpoint) -> None:
        """A cache event was applied."""
        self._cache_events.labels(endpoint.address).inc()

    def cache_gap(self, endpoint: Endpoint) -> None:
        """A cache event did not follow the last one."""
        self._cache_gaps.labels(endpoint.address).inc()

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"quire_router_{name}", help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"quire_router_{name}", help_text, labels, registry=self.registry)


def _in_flight(endpoint: Endpoint) -> float:
    return len(endpoint.flights)


def _ready(endpoint: Endpoint) -> float:
    return float(endpoint.routable)


def _sequence(endpoint: Endpoint) -> float:
    return endpoint.cache.sequence

"""The router's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from quire.router.endpoint import Endpoint
from quire.router.fleet import Fleet
from quire.service.errors import ConfigError
from quire.service.metrics import LATENCY_BUCKETS
from quire.service.request import Finished

# Seconds: from a short prompt on one engine to a long one on a hundred.
_DECISION_BUCKETS = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)

_ENGINE_GAUGES: tuple[tuple[str, str, Callable[[Endpoint], float]], ...] = (
    ("in_flight_requests", "Requests at an engine.", lambda endpoint: len(endpoint.flights)),
    ("engine_ready", "1 if the engine takes requests.", lambda endpoint: endpoint.routable),
    (
        "cache_lag_events",
        "Cache events of the engine that are not applied yet, as of its last report.",
        lambda endpoint: endpoint.cache_lag,
    ),
)


class RouterMetrics:
    """One router's registry; `serve` exposes it over HTTP.

    Engines are labelled by their address, which is known before their name is. The hit rate is prefix_hit_tokens over
    prompt_tokens, of one engine or of their sums.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests that ended.", "reason", "code")
        self._attempts = self._counter(
            "attempts",
            "Requests that engines ended or lost. revision: of those on trial, else empty; outcome: ok, failed.",
            "revision",
            "outcome",
        )
        # By engine, and forgotten with it.
        self._of_engines: list[Counter] = []
        self._prompt_tokens = self._engine_counter("prompt_tokens", "Prompt tokens of requests that engines started.")
        self._hit_tokens = self._engine_counter("prefix_hit_tokens", "Those of them that the engine had cached.")
        self._retries = self._engine_counter(
            "retries", "Requests that left an engine for another before their first token."
        )
        self._moves = self._engine_counter("moves", "Requests that left an engine for another with tokens.")
        self._lost = self._engine_counter("engine_losses", "Sessions with an engine that ended.")
        self._stalls = self._engine_counter("engine_stalls", "Those that ended because the engine did nothing.")
        self._cache_events = self._engine_counter("cache_events", "Cache events applied.")
        self._cache_gaps = self._engine_counter(
            "cache_gaps", "Times that events were missing and a snapshot was asked for."
        )
        self._expected_hit_tokens = self._counter(
            "expected_prefix_hit_tokens", "Prompt tokens that the chosen engines were expected to have cached."
        )
        self._decision = self._histogram(
            "decision_seconds", "Time to choose an engine for a prompt that is hashed.", _DECISION_BUCKETS
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "From submission to the first token.")
        self._reloads = self._counter(
            "reloads", "Files that were loaded again; file: tls, engine_tls; outcome: ok, failed.", "file", "outcome"
        )
        self._stale = Gauge(
            "quire_router_file_stale",
            "1 while the file on the disk can't be used and an older version is in its place.",
            ("file",),
            registry=self.registry,
        )
        self._held = self._histogram("held_seconds", "How long requests waited for an engine that they got.")

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
        self.registry.register(_Gauges(fleet, held))

    def chosen(self, seconds: float, expected_hit_tokens: int) -> None:
        """An engine was chosen for a request."""
        self._decision.observe(seconds)
        self._expected_hit_tokens.inc(expected_hit_tokens)

    def held(self, seconds: float) -> None:
        """A request that was held got an engine."""
        self._held.observe(seconds)

    def started(self, endpoint: Endpoint, prompt_tokens: int, cached_tokens: int) -> None:
        """An engine began with a request."""
        self._prompt_tokens.labels(endpoint.address).inc(prompt_tokens)
        self._hit_tokens.labels(endpoint.address).inc(cached_tokens)

    def first_token(self, seconds: float) -> None:
        """A request's first token has come."""
        self._first_token.observe(seconds)

    def moved(self, endpoint: Endpoint, *, streaming: bool) -> None:
        """A request leaves an engine for another; `streaming` if it has tokens."""
        (self._moves if streaming else self._retries).labels(endpoint.address).inc()

    def finished(self, finished: Finished) -> None:
        """A request ended."""
        code = finished.error.code.value if finished.error else ""
        self._requests.labels(finished.reason.value, code).inc()

    def left_engine(self, revision: str, *, failed: bool) -> None:
        """An engine has ended a request, or lost it."""
        self._attempts.labels(revision, "failed" if failed else "ok").inc()

    def lost(self, endpoint: Endpoint, *, stalled: bool) -> None:
        """The session with an engine is over."""
        self._lost.labels(endpoint.address).inc()
        if stalled:
            self._stalls.labels(endpoint.address).inc()

    def cache_event(self, endpoint: Endpoint) -> None:
        """A cache event was applied."""
        self._cache_events.labels(endpoint.address).inc()

    def cache_gap(self, endpoint: Endpoint) -> None:
        """A cache event did not follow the last one."""
        self._cache_gaps.labels(endpoint.address).inc()

    def reloaded(self, file: str, ok: bool) -> None:
        """A file has changed and was loaded, or could not be."""
        self._reloads.labels(file, "ok" if ok else "failed").inc()
        self._stale.labels(file).set(0 if ok else 1)

    def forget(self, endpoint: Endpoint) -> None:
        """The engine is no longer one of this router's."""
        for counter in self._of_engines:
            counter.remove_by_labels({"engine": endpoint.address})

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"quire_router_{name}", help_text, labels, registry=self.registry)

    def _engine_counter(self, name: str, help_text: str) -> Counter:
        counter = self._counter(name, help_text, "engine")
        self._of_engines.append(counter)
        return counter

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        return Histogram(f"quire_router_{name}", help_text, buckets=buckets, registry=self.registry)


class _Gauges(Collector):
    """What can be read off the router at any time, for the engines that there are then."""

    def __init__(self, fleet: Fleet, held: Callable[[], int]) -> None:
        self._fleet = fleet
        self._held = held

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("quire_router_index_pages", "Distinct pages in the index.", len(self._fleet.index))
        yield GaugeMetricFamily("quire_router_held_requests", "Requests that wait for an engine.", self._held())
        for name, help_text, read in _ENGINE_GAUGES:
            family = GaugeMetricFamily(f"quire_router_{name}", help_text, labels=("engine",))
            # Read by the thread that serves metrics while engines come and go.
            for endpoint in list(self._fleet.endpoints):
                family.add_metric((endpoint.address,), float(read(endpoint)))
            yield family

"""The engine's Prometheus metrics: the last step's report, in Prometheus' words when it asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from quire.engine.messages import Load, Ready, Stepped
from quire.engine.stats import EngineStats, Histogram

_PREFIX = "quire_engine"

_COUNTERS = {
    "steps": "Steps run.",
    "prompt_tokens": "Prompt tokens of requests that started.",
    "cached_prompt_tokens": "Those of them whose pages were there already.",
    "computed_tokens": "Tokens that went through the model.",
    "output_tokens": "Tokens drawn.",
}
_HISTOGRAMS = {
    "step_seconds": "Time of a step.",
    "step_tokens": "Tokens that a step computes.",
    "queue_seconds": "From a request's arrival to its first step.",
    "first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_seconds": "From each token of a request to its next.",
}


class EngineMetrics(Collector):
    """One engine's metrics, each with its name as the label `engine`; `serve` exposes them over HTTP."""

    def __init__(self, engine: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        # Replaced as a whole, never changed: Prometheus' requests come in a thread of their own.
        self._load = Load(0, 0, 0, 0, 0, 0, 0, EngineStats())
        self._start: Mapping[str, float] = {}
        self.registry.register(self)

    def serve(self, port: int) -> None:
        """Exposes the metrics on `port`; 0 is off."""
        if port:
            start_http_server(port, registry=self.registry)

    def record_start(self, ready: Ready) -> None:
        """The core is ready."""
        self._start = ready.start_seconds
        self._load = Load(0, 0, 0, ready.num_pages, ready.num_pages, 0, 0, EngineStats())

    def record(self, message: Stepped) -> None:
        """The core has made a step."""
        self._load = message.load

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """The metrics as they are now."""
        load = self._load
        pages = {
            "cached": load.pages_cached,
            "free": load.pages_available - load.pages_cached,
            "used": load.pages_total - load.pages_available,
        }
        yield self._gauge("running_requests", "Requests in the batch.", load.running)
        yield self._gauge("waiting_requests", "Requests that wait for a slot or for pages.", load.waiting)
        yield self._gauge("pending_prefill_tokens", "Prompt tokens to be computed.", load.pending_prefill_tokens)
        yield self._gauges("pages", "KV pages by state.", "state", pages)
        yield self._gauges("start_seconds", "How long each phase of the start took.", "phase", self._start)
        for name, help_text in _COUNTERS.items():
            yield self._counter(name, help_text, getattr(load.stats, name))
        yield self._counter("preemptions", "Times that a request gave its pages back.", load.preemptions)
        for name, help_text in _HISTOGRAMS.items():
            yield self._histogram(name, help_text, getattr(load.stats, name))

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine"])
        family.add_metric([self._engine], value)
        return family

    def _gauges(self, name: str, help_text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine", label])
        for which, value in values.items():
            family.add_metric([self._engine, which], value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine"])
        family.add_metric([self._engine], value)
        return family

    def _histogram(self, name: str, help_text: str, values: Histogram) -> HistogramMetricFamily:
        family = HistogramMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine"])
        bounds = [*map(floatToGoString, values.bounds), "+Inf"]
        family.add_metric([self._engine], list(zip(bounds, accumulate(values.counts), strict=True)), values.sum)
        return family

"""The engine's Prometheus metrics, fed from what each step reports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from quire.engine.messages import Ready, Stepped
from quire.engine.stats import EngineStats
from quire.service.metrics import LATENCY_BUCKETS


class EngineMetrics:
    """One engine's registry; `serve` exposes it over HTTP."""

    def __init__(self, engine: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self._last = EngineStats()
        self._last_preemptions = 0
        self._running = self._gauge("quire_engine_running_requests", "Requests in the batch.")
        self._waiting = self._gauge("quire_engine_waiting_requests", "Requests that wait for a slot or for pages.")
        self._pages = Gauge("quire_engine_pages", "KV pages by state.", ("engine", "state"), registry=self.registry)
        self._start = Gauge(
            "quire_engine_start_seconds",
            "How long each phase of the start took.",
            ("engine", "phase"),
            registry=self.registry,
        )
        self._step = Histogram(
            "quire_engine_step_seconds",
            "Time of a step.",
            ("engine",),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        ).labels(engine)
        self._counters = {
            name: Counter(f"quire_engine_{name}", help_text, ("engine",), registry=self.registry).labels(engine)
            for name, help_text in (
                ("steps", "Steps run."),
                ("prompt_tokens", "Prompt tokens of requests that started."),
                ("cached_prompt_tokens", "Those of them whose pages were there already."),
                ("computed_tokens", "Tokens that went through the model."),
                ("output_tokens", "Tokens drawn."),
            )
        }
        self._preemptions = Counter(
            "quire_engine_preemptions", "Sequences that gave their pages back.", ("engine",), registry=self.registry
        ).labels(engine)

    def serve(self, port: int) -> None:
        """Exposes the registry on `port`; 0 is off."""
        if port:
            start_http_server(port, registry=self.registry)

    def record_start(self, ready: Ready) -> None:
        """The core is ready."""
        for phase, seconds in ready.start_seconds.items():
            self._start.labels(self._engine, phase).set(seconds)

    def record(self, message: Stepped) -> None:
        """Adds what changed since the last message."""
        load, stats = message.load, message.load.stats
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._pages.labels(self._engine, "cached").set(load.pages_cached)
        self._pages.labels(self._engine, "free").set(load.pages_available - load.pages_cached)
        self._pages.labels(self._engine, "used").set(load.pages_total - load.pages_available)
        for name, counter in self._counters.items():
            counter.inc(getattr(stats, name) - getattr(self._last, name))
        if stats.steps > self._last.steps:
            self._step.observe(stats.last_step_seconds)
        self._preemptions.inc(load.preemptions - self._last_preemptions)
        self._last, self._last_preemptions = stats, load.preemptions

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, ("engine",), registry=self.registry).labels(self._engine)

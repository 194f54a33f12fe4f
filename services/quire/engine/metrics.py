"""The engine's Prometheus metrics: the last step's report, in Prometheus' words when it asks.

What OpenTelemetry's GenAI conventions name has that name here, in Prometheus' spelling and behind `quire_engine_`:
time to first token, request duration, input and output tokens. Rates and shares are counters, so that whoever asks
chooses over how long: the hit rate is `cached_input_tokens` by `input_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from quire.engine.messages import Load, Ready, Stepped
from quire.engine.speculation.stats import SpeculationStats
from quire.engine.stats import EngineStats, Histogram
from quire.service.errors import ConfigError

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_PREFIX = "quire_engine"

# The values of the labels, and the number.
_Values = Iterable[tuple[tuple[str, ...], float]]


class EngineMetrics(Collector):
    """One engine's metrics, each with its name as the label `engine`; `serve` exposes them over HTTP."""

    def __init__(self, engine: str) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        # Replaced as a whole, never changed: Prometheus' requests come in a thread of their own.
        self._load = Load(0, 0, 0, 0, 0, 0, 0, EngineStats())
        self._ready: Ready | None = None
        self._certificate_stale = False
        self._silent_seconds: Callable[[], float] = lambda: 0.0
        self.registry.register(self)

    def serve(self, port: int) -> None:
        """Exposes the metrics on `port`; 0 is off. Raises ConfigError."""
        if not port:
            return
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            raise ConfigError(
                f"can't serve metrics on port {port} ({error.strerror}): choose another --metrics-port",
                field="metrics_port",
            ) from error

    def observe(self, silent_seconds: Callable[[], float]) -> None:
        """Asks this, in whatever thread, for how long no step has ended."""
        self._silent_seconds = silent_seconds

    def record_start(self, ready: Ready) -> None:
        """The core is ready."""
        self._ready = ready
        self._load = Load.at_start(ready)

    def record(self, message: Stepped) -> None:
        """The core has made a step."""
        self._load = message.load

    def certificate_reloaded(self, ok: bool) -> None:
        """The files of the certificate have changed and were loaded, or could not be."""
        self._certificate_stale = not ok

    def collect(self) -> Iterator[Family]:
        """The metrics as they are now."""
        load, stats = self._load, self._load.stats
        if (ready := self._ready) is not None:
            facts = (ready.model, ready.device.device, ready.device.dtype)
            yield self._gauges("info", "What the engine runs, in its labels.", [(facts, 1)], "model", "device", "dtype")
            phases = [((phase,), seconds) for phase, seconds in ready.start_seconds.items()]
            yield self._gauges("start_seconds", "How long each phase of the start took.", phases, "phase")
        stale = "1 while the file on the disk can't be used and an older version is in its place."
        yield self._gauges("file_stale", stale, [(("tls",), self._certificate_stale)], "file")
        silent = "For how long no step has ended although there is work; above --step-timeout the engine ends."
        yield self._gauge("silent_seconds", silent, self._silent_seconds())
        yield self._gauge("running_requests", "Requests in the batch.", load.running)
        yield self._gauge("waiting_requests", "Requests that wait for a slot or for pages.", load.waiting)
        yield self._gauge("pending_prefill_tokens", "Prompt tokens to be computed.", load.pending_prefill_tokens)
        pages = [
            (("used",), load.pages_total - load.pages_available),
            (("cached",), load.pages_cached),
            (("free",), load.pages_available - load.pages_cached),
        ]
        yield self._gauges("pages", "KV pages by state; cached ones are free to be taken.", pages, "state")
        ended = [((reason.lower(),), count) for reason, count in stats.finished.items()]
        yield self._counters("requests", "Requests that ended, by how they did.", ended, "reason")
        yield self._counter("preemptions", "Times that a request gave its pages back.", load.preemptions)
        yield self._counter("input_tokens", "Prompt tokens of requests that started.", stats.prompt_tokens)
        cached = "Those of them whose pages were there already."
        yield self._counter("cached_input_tokens", cached, stats.cached_prompt_tokens)
        yield self._counter("output_tokens", "Tokens drawn.", stats.output_tokens)
        yield self._counter("computed_tokens", "Tokens that went through the model.", stats.computed_tokens)
        if stats.speculation is not None:
            yield from self._speculation(stats.speculation)
        yield self._counter("steps", "Steps run.", stats.steps)
        yield self._histogram("step_duration_seconds", "Time of a step.", stats.step_seconds)
        yield self._histogram("step_tokens", "Tokens that a step computes.", stats.step_tokens)
        yield self._histogram("queue_seconds", "From a request's arrival to its first step.", stats.queue_seconds)
        first = "From a request's arrival to its first token."
        yield self._histogram("time_to_first_token_seconds", first, stats.first_token_seconds)
        between = "From each token of a request to its next."
        yield self._histogram("inter_token_seconds", between, stats.inter_token_seconds)
        whole = "From a request's arrival to its last token; none of those that were cancelled or failed."
        yield self._histogram("request_duration_seconds", whole, stats.request_seconds)

    def _speculation(self, stats: SpeculationStats) -> Iterator[Family]:
        for name, help_text, counts, places in (
            ("drafted", "Tokens that were drafted to follow, by who drafted them.", stats.drafted, None),
            ("verified_draft", "Those of them that steps verified.", stats.verified, stats.verified_at),
            ("accepted_draft", "Those of these that were right.", stats.accepted, stats.accepted_at),
        ):
            by_drafter = [((drafter,), count) for drafter, count in counts.items()]
            yield self._counters(f"{name}_tokens", help_text, by_drafter, "drafter")
            if places is not None:
                by_place = [((str(place),), count) for place, count in enumerate(places, 1)]
                help_text = f"{help_text[:-1]}, by their place in the step's drafts of a request, from 1."
                yield self._counters(f"{name}_tokens_by_position", help_text, by_place, "position")
        siblings = "Second choices beside drafts that steps verified, too."
        yield self._counter("verified_sibling_tokens", siblings, stats.verified_siblings)
        siblings = "Those of them that were right, which count as drafts that were."
        yield self._counter("accepted_sibling_tokens", siblings, stats.accepted_siblings)

    def _gauge(self, name: str, help_text: str, value: float) -> Family:
        return self._gauges(name, help_text, [((), value)])

    def _gauges(self, name: str, help_text: str, values: _Values, *labels: str) -> Family:
        return self._fill(GaugeMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine", *labels]), values)

    def _counter(self, name: str, help_text: str, value: float) -> Family:
        return self._counters(name, help_text, [((), value)])

    def _counters(self, name: str, help_text: str, values: _Values, *labels: str) -> Family:
        return self._fill(CounterMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine", *labels]), values)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, values: _Values) -> Family:
        for label_values, value in values:
            family.add_metric([self._engine, *label_values], value)
        return family

    def _histogram(self, name: str, help_text: str, values: Histogram) -> Family:
        family = HistogramMetricFamily(f"{_PREFIX}_{name}", help_text, labels=["engine"])
        bounds = [*map(floatToGoString, values.bounds), "+Inf"]
        family.add_metric([self._engine], list(zip(bounds, accumulate(values.counts), strict=True)), values.sum)
        return family

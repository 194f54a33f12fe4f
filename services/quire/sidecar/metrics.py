"""What the sidecar counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from quire.service.metrics import CollectorRegistry

_COMPILE_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_FILL_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class SidecarMetrics:
    """The sidecar's series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.compiles = Counter(
            "quire_sidecar_compiles_total",
            "Constraints asked for, by kind and result: cached, compiled, refused or failed.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.compile_seconds = Histogram(
            "quire_sidecar_compile_seconds",
            "Time to compile a constraint that was not cached, its trial included.",
            buckets=_COMPILE_BUCKETS,
            registry=self.registry,
        )
        self.compile_timeouts = Counter(
            "quire_sidecar_compile_timeouts_total",
            "Constraints that took longer to compile than they may.",
            registry=self.registry,
        )
        self.cache_entries = Gauge(
            "quire_sidecar_cache_entries", "Compiled grammars that are kept.", registry=self.registry
        )
        self.cache_bytes = Gauge(
            "quire_sidecar_cache_bytes", "Memory of the compiled grammars that are kept.", registry=self.registry
        )
        self.fill_seconds = Histogram(
            "quire_sidecar_fill_seconds",
            "Time to consume a step's tokens and to fill its rows.",
            buckets=_FILL_BUCKETS,
            registry=self.registry,
        )
        self.slowest_row_seconds = Histogram(
            "quire_sidecar_slowest_row_seconds",
            "CPU time of the slowest row of a step, of those that were slow before or are new.",
            buckets=_FILL_BUCKETS,
            registry=self.registry,
        )
        self.late_rows = Counter(
            "quire_sidecar_late_rows_total", "Rows that were not filled in time.", registry=self.registry
        )
        self.rows = Counter("quire_sidecar_rows_total", "Mask rows that were asked for.", registry=self.registry)
        self.row_errors = Counter(
            "quire_sidecar_row_errors_total", "Rows that could not be filled.", registry=self.registry
        )
        self.streams = Gauge("quire_sidecar_streams", "Engine cores connected.", registry=self.registry)
        self.sequences = Gauge("quire_sidecar_sequences", "Sequences whose state is held.", registry=self.registry)
        self.draft_seconds = Histogram(
            "quire_sidecar_draft_seconds",
            "Time to take in a step's tokens and to propose what may follow.",
            buckets=_FILL_BUCKETS,
            registry=self.registry,
        )
        self.draft_tokens = Counter(
            "quire_sidecar_draft_tokens_total", "Tokens that were proposed.", registry=self.registry
        )
        self.drafted_sequences = Gauge(
            "quire_sidecar_drafted_sequences", "Sequences whose text is known.", registry=self.registry
        )

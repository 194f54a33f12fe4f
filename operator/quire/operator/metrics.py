"""What an operator counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from quire.service.errors import ConfigError
from quire.service.metrics import LATENCY_BUCKETS, CollectorRegistry


class OperatorMetrics:
    """Counters of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.leads = Gauge("quire_operator_leads", "1 while this operator holds the lease.", registry=self.registry)
        self.services = Gauge("quire_operator_services", "Services that are kept.", registry=self.registry)
        self.seconds = Histogram(
            "quire_operator_reconcile_seconds",
            "Time of one look at one service.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.failures = Counter(
            "quire_operator_reconcile_failures_total", "Looks that failed and were tried again.", registry=self.registry
        )

    def serve(self, port: int) -> None:
        """Answers over HTTP unless `port` is 0. Raises ConfigError."""
        if not port:
            return
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"can't listen on --metrics-port {port} ({error.strerror}): choose another") from error

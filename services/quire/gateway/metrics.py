"""What a gateway counts. Names follow OpenTelemetry's GenAI metrics, in Prometheus' spelling."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from quire.service.metrics import LATENCY_BUCKETS


class GatewayMetrics:
    """One instance per process, in `registry`. Labels: `operation` chat | text_completion, `api` http | grpc,
    `outcome` ok or an error's code in lower case."""

    def __init__(self, registry: CollectorRegistry) -> None:
        route = ("operation", "api")
        self.requests = Counter(
            "quire_gateway_requests_total", "Requests that ended.", (*route, "outcome"), registry=registry
        )
        self.in_flight = Gauge(
            "quire_gateway_requests_in_flight",
            "Requests being served.",
            route,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.duration = Histogram(
            "quire_gateway_request_duration_seconds",
            "From a request's arrival to its end.",
            (*route, "outcome"),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token = Histogram(
            "quire_gateway_time_to_first_token_seconds",
            "From a request's arrival to its first output token.",
            ("operation",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "quire_gateway_inter_token_seconds",
            "Between one step's tokens of a request and the next step's.",
            ("operation",),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.input_tokens = Counter(
            "quire_gateway_input_tokens_total", "Prompt tokens of answered requests.", registry=registry
        )
        self.cached_input_tokens = Counter(
            "quire_gateway_cached_input_tokens_total", "Prompt tokens that were cached.", registry=registry
        )
        self.output_tokens = Counter(
            "quire_gateway_output_tokens_total", "Output tokens of answered requests.", registry=registry
        )

"""OpenTelemetry traces: one trace per request across all services, exported over OTLP when configured.

Configuration is OpenTelemetry's own environment: spans leave the process only if OTEL_EXPORTER_OTLP_ENDPOINT (or
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set. The tracer is passed to those who need it; nothing global is set.
"""

from __future__ import annotations

import os

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from quire.service.request import TraceContext

_PROPAGATOR = TraceContextTextMapPropagator()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """A process's tracer and the export behind it. `instance` tells replicas of a service apart."""

    def __init__(self, service: str, instance: str = "") -> None:
        resource = Resource.create({"service.name": f"quire-{service}", "service.instance.id": instance or service})
        self._provider = TracerProvider(resource=resource)
        if any(os.environ.get(name) for name in _ENDPOINTS):
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer: Tracer = self._provider.get_tracer("quire")

    def close(self) -> None:
        """Exports what is still queued; call it last."""
        self._provider.shutdown()


def parent_context(trace: TraceContext) -> Context:
    """The context whose span is the sender's, for `tracer.start_span(context=…)`; a root if `trace` is empty."""
    return _PROPAGATOR.extract({"traceparent": trace.traceparent, "tracestate": trace.tracestate}, Context())


def trace_context(span: Span) -> TraceContext:
    """What to send along so that the receiver's spans become children of `span`."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    return TraceContext(carrier.get("traceparent", ""), carrier.get("tracestate", ""))

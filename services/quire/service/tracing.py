"""OpenTelemetry traces: one trace per request across all services, exported over OTLP when configured.

Configuration is OpenTelemetry's own environment: spans are recorded, and leave the process, only if
OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) is set. The tracer is passed to those who need it;
nothing global is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
    use_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from quire.service.request import TraceContext

_IDS = RandomIdGenerator()
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_PROPAGATOR = TraceContextTextMapPropagator()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """A process's tracer and what takes its spans: `processor`, if given, and the export.

    `instance` tells replicas of a service apart.
    """

    def __init__(self, service: str, instance: str = "", processor: SpanProcessor | None = None) -> None:
        processors = [] if processor is None else [processor]
        if any(os.environ.get(name) for name in _ENDPOINTS):
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            processors.append(BatchSpanProcessor(OTLPSpanExporter()))
        self.tracer: Tracer = _PassingTracer()
        self._provider: TracerProvider | None = None
        if processors:
            resource = Resource.create({"service.name": f"quire-{service}", "service.instance.id": instance or service})
            self._provider = TracerProvider(resource=resource)
            for each in processors:
                self._provider.add_span_processor(each)
            self.tracer = self._provider.get_tracer("quire")

    def close(self) -> None:
        """Exports what is still queued; call it last."""
        if self._provider is not None:
            self._provider.shutdown()


class _PassingTracer(Tracer):
    """Of a process that nobody takes spans from: traces pass through it as if it were not there.

    What it would be the parent of hangs on the sender's span. A request without a trace gets one, for the logs. To
    record spans only to drop them would cost every request.
    """

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> Span:
        """The sender's span, or a new one; it records nothing."""
        sender = get_current_span(context).get_span_context()
        if sender.is_valid:
            return NonRecordingSpan(sender)
        trace_id, span_id = _IDS.generate_trace_id(), _IDS.generate_span_id()
        return NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=False, trace_flags=_SAMPLED))

    @contextmanager
    def start_as_current_span(self, name: str, context: Context | None = None, **_: Any) -> Iterator[Span]:  # type: ignore[override]
        """As `start_span`, and current in the block."""
        with use_span(self.start_span(name, context)) as span:
            yield span


def parent_context(trace: TraceContext) -> Context:
    """The context whose span is the sender's, for `tracer.start_span(context=…)`; a root if `trace` is empty."""
    if not trace.traceparent:
        return Context()
    return _PROPAGATOR.extract({"traceparent": trace.traceparent, "tracestate": trace.tracestate}, Context())


def trace_context(span: Span) -> TraceContext:
    """What to send along so that the receiver's spans become children of `span`."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
    return TraceContext(carrier.get("traceparent", ""), carrier.get("tracestate", ""))

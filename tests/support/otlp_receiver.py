"""A real OTLP receiver: the collector's TraceService over gRPC, keeping the spans it is sent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """What the tests look at of a received span."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, object]


class OtlpReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a free loopback port until `stop`."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None)

    def Export(self, request, context):  # noqa: N802
        with self._changed:
            for resource in request.resource_spans:
                facts = _attributes(resource.resource.attributes)
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        self._spans.append(
                            Span(
                                str(facts["service.name"]),
                                span.name,
                                span.trace_id.hex(),
                                span.span_id.hex(),
                                span.parent_span_id.hex(),
                                _attributes(span.attributes),
                            )
                        )
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str, services: set[str], deadline: float = 20.0) -> list[Span]:
        """The spans of a trace, once every one of `services` has sent one; raises TimeoutError."""

        def complete() -> list[Span] | None:
            spans = [span for span in self._spans if span.trace_id == trace_id]
            return spans if {span.service for span in spans} >= services else None

        with self._changed:
            spans = self._changed.wait_for(complete, deadline)
            if spans is None:
                seen = {span.service for span in self._spans if span.trace_id == trace_id}
                raise TimeoutError(f"trace {trace_id} has spans of {seen} only, after {deadline} s")
            return spans


def _attributes(pairs) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}

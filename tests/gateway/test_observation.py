"""What the gateway tells of its requests: spans, metrics, log lines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import grpc
import httpx
import pytest
from fake_router import FakeRouter
from gateway_testing import ANSWER, MODEL
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.parser import text_string_to_metric_families

from quire.gateway.server import Gateway
from quire.service.grpc_server import channel
from quire.v1 import inference_pb2, inference_pb2_grpc

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
SECRET = "the prompt that nobody may read"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}]}


def samples(exposition: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


async def test_span_of_a_chat(http: httpx.AsyncClient, router: FakeRouter, spans: InMemorySpanExporter) -> None:
    """Without it a trace would break at the gateway, or lack what GenAI dashboards ask for."""
    body = CHAT | {"seed": 7, "temperature": 0.5, "max_tokens": 50, "top_k": 3, "stop": "zzz"}
    headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    response = (await http.post("/v1/chat/completions", json=body, headers=headers)).json()
    (span,) = spans.get_finished_spans()
    assert span.name == f"chat {MODEL}"
    assert span.kind is SpanKind.SERVER
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert isinstance(span.attributes, Mapping)
    attributes = dict(span.attributes)
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ("zzz",),
        "gen_ai.request.stream": False,
        "gen_ai.output.type": "text",
        "gen_ai.response.id": response["id"],
        "gen_ai.response.model": MODEL,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": response["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.usage.output_tokens": response["usage"]["completion_tokens"],
    }
    sent = (await router.next()).request.trace
    assert sent.traceparent == f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert sent.tracestate == "vendor=1"


async def test_root_span(http: httpx.AsyncClient, spans: InMemorySpanExporter) -> None:
    """Without it a request that brings no trace would have none, and a seed above 2^63 could break the export."""
    await http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "seed": 2**64 - 1})
    (span,) = spans.get_finished_spans()
    assert span.name == f"text_completion {MODEL}"
    assert span.parent is None
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.seed"] == -1


async def test_span_of_a_grpc_call(gateway: Gateway, spans: InMemorySpanExporter) -> None:
    """Without it calls over gRPC would be missing from traces."""
    async with channel(gateway.grpc_address) as dialed:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(dialed)
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x"))
        await stub.Generate(request, metadata=grpc.aio.Metadata(("traceparent", PARENT)))
    (span,) = spans.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == TRACE_ID


async def test_failures_show(
    http: httpx.AsyncClient, router: FakeRouter, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it a client's mistake could look like our failure, or not be seen at all."""
    caplog.set_level(logging.INFO)
    await http.post("/v1/chat/completions", json=CHAT | {"temperature": 9})
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "invalid_argument"
    assert span.status.status_code is StatusCode.UNSET
    (record,) = [record for record in caplog.records if record.name == "quire.gateway.observation"]
    assert record.levelno == logging.INFO
    assert vars(record)["field"] == "temperature"
    exposition = samples((await http.get("/metrics")).text)
    outcome = labels(operation="chat", api="http", outcome="invalid_argument")
    assert exposition["quire_gateway_requests_total", outcome] == 1


async def test_metrics(http: httpx.AsyncClient) -> None:
    """Without it a dashboard would show too few tokens, or requests in flight for ever."""
    usage = (await http.post("/v1/chat/completions", json=CHAT)).json()["usage"]
    response = await http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    exposition = samples(response.text)
    ok = labels(operation="chat", api="http", outcome="ok")
    chat = labels(operation="chat")
    assert exposition["quire_gateway_requests_total", ok] == 1
    assert exposition["quire_gateway_request_duration_seconds_count", ok] == 1
    assert exposition["quire_gateway_requests_in_flight", labels(operation="chat", api="http")] == 0
    assert exposition["quire_gateway_time_to_first_token_seconds_count", chat] == 1
    assert 0 < exposition["quire_gateway_inter_token_seconds_count", chat] < usage["completion_tokens"]
    assert exposition["quire_gateway_input_tokens_total", labels()] == usage["prompt_tokens"]
    assert exposition["quire_gateway_cached_input_tokens_total", labels()] == 16
    assert exposition["quire_gateway_output_tokens_total", labels()] == usage["completion_tokens"]


async def test_log_line(http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """Without it a request could leave no line, two, or one that gives away what was said."""
    caplog.set_level(logging.DEBUG)
    headers = {"X-Request-Id": "mine", "traceparent": PARENT}
    response = (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).json()
    (record,) = [record for record in caplog.records if record.name == "quire.gateway.observation"]
    facts = vars(record)
    assert record.getMessage() == "chat over http: ok"
    assert facts["request_id"] == "mine"
    assert facts["answer_id"] == response["id"]
    assert facts["trace_id"] == TRACE_ID
    assert facts["completion_tokens"] == response["usage"]["completion_tokens"]
    assert facts["ttft_ms"] > 0
    everything = "\n".join(str(vars(line)) for line in caplog.records if line.name.startswith("quire"))
    assert SECRET not in everything
    assert ANSWER not in everything


async def test_client_that_leaves_is_no_failure(
    gateway: Gateway, http: httpx.AsyncClient, router: FakeRouter, spans: InMemorySpanExporter
) -> None:
    """Without it every closed browser tab would raise an alarm."""
    await router.set_serving(False)
    while (await http.get("/ready")).status_code == 200:
        pass
    request = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    in_flight = "quire_gateway_requests_in_flight", labels(operation="chat", api="http")
    while samples((await http.get("/metrics")).text).get(in_flight) != 1:
        pass
    request.cancel()
    cancelled = "quire_gateway_requests_total", labels(operation="chat", api="http", outcome="cancelled")
    while samples((await http.get("/metrics")).text).get(cancelled) != 1:
        pass
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.UNSET

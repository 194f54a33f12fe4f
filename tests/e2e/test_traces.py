"""One trace per request, across every process that touched it."""

from __future__ import annotations

import secrets

import pytest
from openai import OpenAI
from otlp_receiver import OtlpReceiver
from served import MODEL

pytestmark = pytest.mark.e2e

SERVICES = {"quire-gateway", "quire-router", "quire-engine", "quire-sidecar"}


def test_one_trace_crosses_four_services(client: OpenAI, receiver: OtlpReceiver) -> None:
    """Without the right parents a slow request can't be followed to the service that made it slow."""
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Yes or no?"}], max_tokens=5, temperature=0,
        extra_body={"regex": "yes|no"}, extra_headers={"traceparent": f"00-{trace_id}-{caller}-01"},
    )  # fmt: skip
    spans = receiver.trace(trace_id, SERVICES)
    by_service = {span.service: span for span in spans}
    gateway, router, engine, sidecar = (by_service[f"quire-{s}"] for s in ("gateway", "router", "engine", "sidecar"))
    assert gateway.parent_id == caller
    assert router.parent_id == gateway.span_id
    assert engine.parent_id == router.span_id
    assert sidecar.parent_id == engine.span_id
    assert gateway.name == f"chat {MODEL}"
    assert gateway.attributes["gen_ai.operation.name"] == "chat"
    assert gateway.attributes["gen_ai.request.model"] == MODEL
    assert engine.attributes["gen_ai.usage.output_tokens"] == gateway.attributes["gen_ai.usage.output_tokens"]

"""What every service tells of itself, whatever it is asked to do: the metrics' names, and a line for each request."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from served import MODEL, serve

from quire.engine.metrics import EngineMetrics
from quire.gateway.metrics import GatewayMetrics
from quire.router.core import Router
from quire.router.endpoint import Load, Phase
from quire.router.metrics import RouterMetrics
from quire.service.tracing import Tracing
from quire.sidecar.metrics import SidecarMetrics


def names(registry: CollectorRegistry) -> set[str]:
    """Of all that it would show."""
    return {family.name for family in registry.collect()}


async def test_each_question_has_a_metric() -> None:
    """Dashboards, alerts and autoscaling are written against these names: a new name is a graph that goes blank."""
    gateway = CollectorRegistry()
    GatewayMetrics(gateway)
    router = RouterMetrics()
    tracing = Tracing("router")
    core = Router(hold=1, max_moves=1, retry_share=1, tracer=tracing.tracer, metrics=router)
    endpoint = core.add_engine("unix:/e")
    core.engine_reported(endpoint, Load(0, 0, 0, 0, 0, 0.0, 0.0, Phase.READY))
    shown = {
        "quire_gateway": names(gateway),
        "quire_router": names(router.registry),
        "quire_engine": names(EngineMetrics("engine-0").registry),
        "quire_sidecar": names(SidecarMetrics().registry),
    }
    tracing.close()
    asked: dict[str, Sequence[str]] = {
        "quire_gateway": (
            "time_to_first_token_seconds", "inter_token_seconds", "requests_in_flight", "requests",
            "input_tokens", "cached_input_tokens", "output_tokens",
        ),
        "quire_router": (
            "time_to_first_token_seconds", "held_seconds", "held_requests", "in_flight_requests", "prompt_tokens",
            "prefix_hit_tokens", "expected_prefix_hit_tokens", "retries", "moves", "cache_lag_events", "cache_gaps",
            "requests", "decision_seconds",
        ),
        "quire_engine": (
            "time_to_first_token_seconds", "inter_token_seconds", "queue_seconds", "running_requests",
            "waiting_requests", "input_tokens", "cached_input_tokens", "requests", "silent_seconds",
        ),
        "quire_sidecar": (
            "fill_seconds", "slowest_row_seconds", "late_rows", "compile_seconds", "compile_timeouts", "compiles",
        ),
    }  # fmt: skip
    for service, wanted in asked.items():
        assert {f"{service}_{name}" for name in wanted} <= shown[service]


@pytest.mark.e2e
def test_a_line_for_each_request_in_every_service(tmp_path: Path) -> None:
    """A request that somebody complains of is found in every log by its trace, and none holds what was said."""
    log = tmp_path / "log"
    trace_id, secret = secrets.token_hex(16), "heliotrope"
    with serve(log, "--log-format", "json") as served:
        body = {
            "model": MODEL, "prompt": f"The {secret} is", "max_tokens": 4, "temperature": 0, "regex": "(red|blue)"
        }  # fmt: skip
        headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01", "X-Request-Id": "mine"}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        told = _lines(log, trace_id, 4)
        assert secret not in log.read_text()
    assert sorted(line["process"] for line in told) == ["engine-0", "gateway", "router", "sidecar-0"]
    assert {line["level"] for line in told} == {"info"}
    by_process = {line["process"]: line for line in told}
    assert by_process["sidecar-0"]["kind"] == "regex" and by_process["sidecar-0"]["outcome"] == "ok"
    for process, tokens in (
        ("gateway", "completion_tokens"),
        ("router", "output_tokens"),
        ("engine-0", "output_tokens"),
    ):
        assert by_process[process][tokens] == answer.json()["usage"]["completion_tokens"]
        # Behind the gateway the answer's own id is the request's: clients choose theirs, and choose the same.
        assert by_process[process]["answer_id" if process == "gateway" else "request_id"] == answer.json()["id"]
    assert by_process["gateway"]["request_id"] == "mine"


def _lines(log: Path, trace_id: str, count: int) -> list[dict[str, Any]]:
    """The lines of a trace, once there are so many; each service writes its own when it is done."""
    end = time.monotonic() + 20
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines() if trace_id in line]
        if len(lines) >= count or time.monotonic() > end:
            return lines
        # Nothing tells when a log has grown.
        time.sleep(0.02)

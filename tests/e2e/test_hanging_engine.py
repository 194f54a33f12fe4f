"""An engine whose device hangs, behind a router that has another."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cluster import Cluster
from engine_process import core_of
from processes import until_ended
from tiny_checkpoint import tiny_checkpoint

from quire.v1 import engine_pb2, engine_pb2_grpc

pytestmark = pytest.mark.e2e

# Its answer takes seconds: it has not ended when its engine is stopped.
BODY: dict[str, Any] = {
    "model": "tiny", "prompt": "Once", "max_tokens": 1500, "temperature": 0, "stream": True, "ignore_eos": True,
}  # fmt: skip


async def answer(http: httpx.AsyncClient) -> AsyncIterator[str]:
    """The events of a stream, up to its end."""
    async with http.stream("POST", "/v1/completions", json=BODY) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


def text_of(events: list[str]) -> str:
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    chunks = [json.loads(event) for event in events[:-1]]
    assert not [chunk for chunk in chunks if "error" in chunk]
    assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]] == ["length"]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def is_busy(cluster: Cluster, name: str) -> bool:
    async with grpc.aio.insecure_channel(cluster.address(name)) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        return (await stub.GetStatus(engine_pb2.GetStatusRequest(), timeout=20)).load.running > 0


async def test_a_stream_on_an_engine_that_hangs_goes_on_elsewhere(tmp_path: Path) -> None:
    """The router alone would see it only after a time that no step may take; the engine would stay as it is, with a
    health that says that all is well, until somebody looks."""
    model = tiny_checkpoint(tmp_path / "tiny")
    cluster = Cluster(
        tmp_path, model, num_routers=1, num_engines=2, stall_timeout=600, engine_flags=("--step-timeout=1",)
    )
    async with cluster.running(), httpx.AsyncClient(base_url=cluster.url, timeout=120) as http:
        undisturbed = text_of([event async for event in answer(http)])
        events: list[str] = []
        async for event in answer(http):
            events.append(event)
            if len(events) == 3:
                (busy,) = [name for name in cluster.engines if await is_busy(cluster, name)]
                core = core_of(cluster.pid(busy))
                os.kill(core, signal.SIGSTOP)
        assert text_of(events) == undisturbed
        assert await cluster.ended(busy) == 1
        until_ended([core])
        log = cluster.log(busy)
        assert "no step has ended for 1 s although there is work: the core hangs" in log and "Traceback" not in log
        # Whoever comes later is served, too.
        assert text_of([event async for event in answer(http)]) == undisturbed

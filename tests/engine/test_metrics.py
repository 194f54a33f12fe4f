"""What an engine tells Prometheus: scraped over HTTP from a real process, after work whose numbers are known."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from engine_process import engine, prompt_of, request
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from served import free_port
from session_client import DEADLINE, SessionClient
from tiny_models import tiny_llama

from quire.engine.config import EngineConfig
from quire.engine.messages import Load, Stepped
from quire.engine.metrics import EngineMetrics
from quire.engine.speculation.drafts import Drafter
from quire.engine.speculation.stats import SpeculationStats
from quire.engine.stats import EngineStats
from quire.service.errors import ConfigError
from quire.service.request import StopConditions

PAGES = 900
DRAFTS = ("drafted", "verified_draft", "accepted_draft")


async def scrape(port: int) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=DEADLINE) as client:
        response = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return response.text


async def samples(port: int) -> dict[str, float]:
    return samples_of(list(text_string_to_metric_families(await scrape(port))))


def samples_of(families: list[Metric]) -> dict[str, float]:
    """Each sample under its name and its labels but `engine`."""
    samples = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("engine") == "engine-0", sample
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def check_exposition(text: str, families: list[Metric]) -> None:
    """What Prometheus' own tool finds wrong, where it is installed, and what can be checked without."""
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.name.startswith("quire_engine_") and family.documentation, family
        assert family.type in ("gauge", "counter", "histogram"), family
        if family.type == "histogram":
            check_histogram(family)
    if tool := shutil.which("promtool"):
        done = subprocess.run([tool, "check", "metrics"], input=text, text=True, capture_output=True, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr


def check_histogram(family: Metric) -> None:
    buckets = [sample for sample in family.samples if sample.name.endswith("_bucket")]
    bounds, counts = [float(sample.labels["le"]) for sample in buckets], [sample.value for sample in buckets]
    assert bounds == sorted(bounds) and bounds[-1] == float("inf") and counts == sorted(counts)
    assert {sample.name: sample.value for sample in family.samples}[f"{family.name}_count"] == counts[-1]


async def test_numbers_add_up_after_known_work(tmp_path: Path) -> None:
    """A dashboard that counts wrong is believed: every token, page and end of known requests must be in the numbers."""
    model = tmp_path / "tiny"
    tiny_llama(model, max_position_embeddings=4096)
    port = free_port()
    flags = ["--metrics-port", str(port), "--num-pages", str(PAGES), "--max-num-seqs", "2"]
    async with engine(model, tmp_path / "e", *flags) as pod, SessionClient(pod.address) as session:
        idle = await samples(port)
        assert idle["quire_engine_pages{state=free}"] == PAGES and idle["quire_engine_steps_total"] == 0
        # 100 tokens are 6 full pages, and their last token is computed in any case: 96 are found the second time.
        lengths, outputs = (100, 33, 1, 100), (6, 1, 20, 4)
        for length, output in zip(lengths, outputs, strict=True):
            stop = StopConditions(output, ignore_eos=True)
            await session.submit(request(prompt_of(length, length), output, stop=stop)).result()
        # Long enough not to end before they are looked at.
        stop = StopConditions(4000, ignore_eos=True)
        held = [session.submit(request(prompt_of(40, seed), stop=stop)) for seed in (2, 3, 4)]
        await asyncio.gather(held[0].until_tokens(1), held[1].until_tokens(1))
        async with asyncio.timeout(DEADLINE):
            # The third may have arrived after a step that gave the second its token.
            while not (busy := await samples(port))["quire_engine_waiting_requests"]:
                pass
        for stream in held:
            session.cancel(stream)
            await stream.result()
        text = await scrape(port)
    families = list(text_string_to_metric_families(text))
    check_exposition(text, families)
    now = samples_of(families)

    assert (busy["quire_engine_running_requests"], busy["quire_engine_waiting_requests"]) == (2, 1)
    assert busy["quire_engine_pages{state=used}"] >= 2 * 3 and busy["quire_engine_pending_prefill_tokens"] == 40
    for when in (idle, busy, now):
        assert sum(value for name, value in when.items() if name.startswith("quire_engine_pages{")) == PAGES

    ended = {"length": 4, "cancelled": 3, "stop": 0, "error": 0}
    assert {reason: now[f"quire_engine_requests_total{{reason={reason}}}"] for reason in ended} == ended
    assert now["quire_engine_request_duration_seconds_count"] == 4
    started = now["quire_engine_queue_seconds_count"]
    assert started in (6, 7)  # the third of those that were held may have got the slot of the first before its own end
    assert now["quire_engine_input_tokens_total"] == sum(lengths) + 40 * (started - 4)
    assert now["quire_engine_cached_input_tokens_total"] == 96
    firsts, gaps = now["quire_engine_time_to_first_token_seconds_count"], now["quire_engine_inter_token_seconds_count"]
    drawn = now["quire_engine_output_tokens_total"]
    assert drawn == firsts + gaps and drawn >= sum(outputs) + 2
    # Every token but the last of each request goes through the model again to draw the next.
    assert now["quire_engine_computed_tokens_total"] == now["quire_engine_step_tokens_sum"]
    assert now["quire_engine_computed_tokens_total"] == now["quire_engine_input_tokens_total"] - 96 + gaps
    assert now["quire_engine_steps_total"] == now["quire_engine_step_duration_seconds_count"] > 0
    assert now["quire_engine_step_tokens_count"] == now["quire_engine_steps_total"]
    assert 0 < now["quire_engine_step_duration_seconds_sum"] < DEADLINE
    assert now["quire_engine_running_requests"] == now["quire_engine_waiting_requests"] == 0
    assert now["quire_engine_pages{state=used}"] == 0 and now["quire_engine_pages{state=cached}"] > 0
    assert now["quire_engine_preemptions_total"] == 0
    assert now["quire_engine_info{device=cpu,dtype=float32,model=tiny}"] == 1


def test_a_port_that_is_taken_or_none_is_said() -> None:
    """A pod that dies with a traceback says nothing of the flag to change."""
    port = free_port()
    EngineMetrics("one").serve(port)
    with pytest.raises(ConfigError, match=rf"can't serve metrics on port {port} \(Address already in use\): choose"):
        EngineMetrics("two").serve(port)
    with pytest.raises(ConfigError, match="--metrics-port is 70000: give a port from 1 to 65535"):
        EngineConfig("unix:x", metrics_port=70000)


def test_speculation_is_told_by_drafter_and_place() -> None:
    """Whether drafts are worth their while, and how many of them, can't be seen from tokens per second."""
    metrics, stats = EngineMetrics("engine-0"), EngineStats()
    names = {family.name for family in metrics.registry.collect()}
    assert not any("draft" in name for name in names)
    stats.speculation = SpeculationStats()
    stats.speculation.drafted["suffix"] += 9
    stats.speculation.record(Drafter.SUFFIX, 3, 1)
    stats.speculation.record(Drafter.SUFFIX, 2, 2)
    stats.speculation.verified_siblings, stats.speculation.accepted_siblings = 7, 1
    metrics.record(Stepped((), (), (), Load(1, 0, 0, 10, 9, 0, 0, stats)))
    text = generate_latest(metrics.registry).decode()
    families = list(text_string_to_metric_families(text))
    check_exposition(text, families)
    now = samples_of(families)
    counted = [now[f"quire_engine_{name}_tokens_total{{drafter=suffix}}"] for name in DRAFTS]
    assert counted == [9, 5, 3]
    assert now["quire_engine_verified_draft_tokens_total{drafter=forced}"] == 0
    assert [now[f"quire_engine_{name}_sibling_tokens_total"] for name in ("verified", "accepted")] == [7, 1]
    places = [
        [now[f"quire_engine_{name}_tokens_by_position_total{{position={place}}}"] for place in (1, 2)]
        for name in DRAFTS[1:]
    ]
    assert places == [[2, 2], [2, 1]]

"""Two engines behind one router: prompts go where their pages are, and a dead engine breaks nothing."""

from __future__ import annotations

import os
import secrets
import signal

import pytest
from openai import OpenAI
from otlp_receiver import OtlpReceiver
from served import MODEL, Served, until_ready

pytestmark = pytest.mark.e2e

SERVICES = {"quire-gateway", "quire-router", "quire-engine"}


def ask(client: OpenAI, receiver: OtlpReceiver, prompt: str, max_tokens: int = 4) -> tuple[str, str, int]:
    """The answer's text, the engine that gave it, and how many prompt tokens were cached."""
    trace_id = secrets.token_hex(16)
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0,
        extra_headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"},
    )  # fmt: skip
    spans = receiver.trace(trace_id, SERVICES)
    engine = str(next(span for span in spans if span.service == "quire-engine").attributes["quire.engine"])
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    return answer.choices[0].text, engine, answer.usage.prompt_tokens_details.cached_tokens or 0


def long_prompt(topic: str) -> str:
    """About a thousand tokens that begin with `topic`."""
    return f"{topic}: " + " ".join(f"{topic} number {i} is followed by number {i + 1}." for i in range(85))


def test_a_prefix_goes_to_the_engine_that_holds_it(client: OpenAI, receiver: OtlpReceiver) -> None:
    """The router's whole point: a long shared prompt is computed once, whatever else was asked in between."""
    places = {}
    for topic in ("apples", "bridges", "clouds"):
        _, places[topic], cached = ask(client, receiver, long_prompt(topic))
        assert cached == 0
    for topic, engine in places.items():
        _, again, cached = ask(client, receiver, long_prompt(topic) + " What comes next?")
        assert again == engine and cached >= 900


def test_killing_the_other_engine_disturbs_nothing(served: Served, client: OpenAI, receiver: OtlpReceiver) -> None:
    """A stream on a healthy engine must not notice that its neighbour died."""
    _, engine, _ = ask(client, receiver, long_prompt("deserts"))
    undisturbed, _, _ = ask(client, receiver, long_prompt("deserts"), 40)
    other = "engine-1" if engine == "engine-0" else "engine-0"
    stream = client.completions.create(
        model=MODEL, prompt=long_prompt("deserts"), max_tokens=40, temperature=0, stream=True
    )
    text = next(stream).choices[0].text
    os.kill(served.pid_of("quire.engine", f"--name={other}"), signal.SIGKILL)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == undisturbed
    until_ready(served.process, served.url, served.log, 60)


def test_killing_the_engine_of_a_stream_moves_it(served: Served, client: OpenAI, receiver: OtlpReceiver) -> None:
    """The router holds every stream's tokens: the client sees one unbroken answer, the same as without the fault, and
    one trace, in which the engine that took over stands where the dead one would."""
    prompt = long_prompt("elephants")
    undisturbed, engine, _ = ask(client, receiver, prompt, 60)
    trace_id, caller = secrets.token_hex(16), secrets.token_hex(8)
    stream = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=60, temperature=0, stream=True, stream_options={"include_usage": True},
        extra_headers={"traceparent": f"00-{trace_id}-{caller}-01"},
    )  # fmt: skip
    text = "".join(next(stream).choices[0].text for _ in range(3))
    os.kill(served.pid_of("quire.engine", f"--name={engine}"), signal.SIGKILL)
    chunks = list(stream)
    text += "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == undisturbed
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 60
    by_service = {span.service: span for span in receiver.trace(trace_id, SERVICES)}
    gateway, router, second = (by_service[f"quire-{service}"] for service in ("gateway", "router", "engine"))
    assert (gateway.parent_id, router.parent_id, second.parent_id) == (caller, gateway.span_id, router.span_id)
    assert router.attributes["quire.moves"] == 1
    assert second.attributes["quire.engine"] == router.attributes["quire.engine"] != engine
    until_ready(served.process, served.url, served.log, 60)

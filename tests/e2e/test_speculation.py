"""Speculation through the whole of `quire serve`: the same answers, fewer steps, and all of it in the usage."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from openai import OpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from otlp_receiver import OtlpReceiver
from served import MODEL, Served, serve

from quire.v1 import engine_pb2, engine_pb2_grpc, inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.e2e

CODE = "".join(
    f"def {name}(width, height, depth):\n    total = width * height * depth\n    return total\n\n"
    for name in ("volume", "weight", "volume")
)
# A model that sees this goes on with it.
REPEATED = f"{CODE}\n{CODE}\n{CODE[:120]}"
SCHEMA = {
    "type": "object",
    "properties": {
        "identification_number": {"enum": ["not applicable", "unknown"]},
        "preferred_delivery_address": {"const": "12 Long Street, Springfield"},
        "number_of_previous_orders": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["identification_number", "preferred_delivery_address", "number_of_previous_orders"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def speculating(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    log = tmp_path_factory.mktemp("speculating") / "log"
    with serve(log, "--speculation", "auto", "--dtype", "float32", environment=environment) as served:
        yield served


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """The same without: one token a step."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with serve(log, "--speculation", "off", "--dtype", "float32") as served:
        yield client_of(served)


@pytest.fixture(scope="module")
def quick(speculating: Served) -> OpenAI:
    return client_of(speculating)


def client_of(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def predicted(usage: CompletionUsage | None) -> tuple[int, int]:
    """Accepted and rejected prediction tokens."""
    assert usage is not None and usage.completion_tokens_details is not None
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens is not None and details.rejected_prediction_tokens is not None
    assert details.accepted_prediction_tokens <= usage.completion_tokens
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


def test_what_repeats_comes_in_fewer_steps(plain: OpenAI, quick: OpenAI, receiver: OtlpReceiver) -> None:
    """The answer must be the one without drafts, token for token, and the client must see what they did for it."""
    trace_id = secrets.token_hex(16)
    expected, found = (
        one.completions.create(
            model=MODEL, prompt=REPEATED, max_tokens=100, temperature=0,
            extra_headers={"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"} if one is quick else {},
        )
        for one in (plain, quick)
    )  # fmt: skip
    assert found.choices[0].text == expected.choices[0].text
    assert predicted(expected.usage) == (0, 0)
    accepted, rejected = predicted(found.usage)
    assert accepted > 10
    engine = next(span for span in receiver.trace(trace_id, {"quire-engine"}) if span.service == "quire-engine")
    assert engine.attributes["quire.speculation.accepted_drafts"] == accepted
    assert engine.attributes.get("quire.speculation.rejected_drafts", 0) == rejected


def test_what_a_grammar_forces_is_not_waited_for(plain: OpenAI, quick: OpenAI) -> None:
    """The names of a JSON object's fields cost a step a token, although nothing else may follow."""
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}

    def ask(client: OpenAI) -> ChatCompletion:
        return client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Make up an order."}], max_tokens=100, temperature=0,
            response_format=form,  # type: ignore[call-overload, no-any-return]
            # Nothing is remembered of the answers before.
            extra_body={"cache_salt": secrets.token_hex(8)},
        )  # fmt: skip

    expected = ask(plain).choices[0].message.content
    assert json.loads(expected or "").keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    # A machine that is held up in the first steps with drafts makes them look dear for a while.
    for _ in range(5):
        found = ask(quick)
        assert found.choices[0].message.content == expected
        if predicted(found.usage)[0] > 10:
            return
    pytest.fail(f"of five answers the last had {predicted(found.usage)[0]} forced tokens without a step of their own")


def test_it_is_in_the_usage_over_grpc_and_in_quire_top(speculating: Served) -> None:
    """Who looks must see whether speculation is worth its while."""
    with grpc.insecure_channel(speculating.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        prompt, options = inference_pb2.Prompt(text=REPEATED), inference_pb2.GenerationOptions(max_tokens=60)
        options.temperature = 0.0
        answer = stub.Generate(inference_pb2.GenerateRequest(prompt=prompt, options=options), timeout=120)
    assert 0 < answer.usage.accepted_prediction_tokens <= answer.usage.completion_tokens
    address = next(
        word.partition("=")[2]
        for word in speculating.command_of("quire.engine", "--name=engine-0")
        if word.startswith("--listen=")
    )
    shown = subprocess.run(
        [sys.executable, "-m", "quire.cli.main", "top", "--once", "--engine", address],
        capture_output=True, text=True, check=True, timeout=60, env=os.environ | {"COLUMNS": "160"},
    ).stdout  # fmt: skip
    assert "of drafts right (" in shown and "tokens drawn a step" in shown
    # Routers reckon with it.
    with grpc.insecure_channel(address) as channel:
        status = engine_pb2_grpc.EngineServiceStub(channel).GetStatus(engine_pb2.GetStatusRequest(), timeout=60)
    assert 1 < status.load.decode_tokens_per_step <= 9


def test_a_sidecar_that_dies_changes_nothing(speculating: Served, plain: OpenAI, quick: OpenAI) -> None:
    """Drafts come from beside the engine: without them the answer is slower, and nothing else."""
    prompt = f"# Shapes\n{REPEATED}"
    expected = plain.completions.create(model=MODEL, prompt=prompt, max_tokens=150, temperature=0)
    stream = quick.completions.create(model=MODEL, prompt=prompt, max_tokens=150, temperature=0, stream=True)
    text = next(stream).choices[0].text
    os.kill(speculating.pid_of("quire.sidecar"), signal.SIGKILL)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected.choices[0].text

"""Everything fails at once and in turn, under load, and no client notices.

`QUIRE_CHAOS_SEED=… pytest tests/e2e/test_chaos.py` repeats a run's faults; `QUIRE_CHAOS_FAULTS=…` makes it longer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from cluster import Cluster
from tiny_checkpoint import tiny_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_STREAMS = 200
NUM_QUESTIONS = 24
MAX_TOKENS = 100
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Question:
    """A request whose answer is decided by its body alone."""

    body: dict[str, Any]

    @property
    def constrained(self) -> bool:
        return "response_format" in self.body


@dataclass
class Answer:
    """What came back: everything that should come once is counted."""

    text: str = ""
    finish_reasons: list[str] = field(default_factory=list)
    usages: list[int] = field(default_factory=list)
    errors: list[object] = field(default_factory=list)
    dones: int = 0

    @property
    def whole(self) -> bool:
        return len(self.finish_reasons) == len(self.usages) == self.dones == 1 and not self.errors


def questions(model: str) -> list[Question]:
    """Half of them constrained and greedy, half free: greedy, or drawn with a seed. Many begin alike."""
    found = []
    for index in range(NUM_QUESTIONS):
        prompt = f"Chapter {index % 3}. " * 8 + f"Question {index}:"
        body: dict[str, Any] = {
            "model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True,
            "stream_options": {"include_usage": True}, "temperature": 0,
        }  # fmt: skip
        if index % 2:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        elif index % 4:
            body |= {"temperature": 1.0, "seed": index, "top_p": 0.9}
        found.append(Question(body))
    return found


async def ask(http: httpx.AsyncClient, question: Question) -> Answer:
    answer = Answer()
    async with http.stream("POST", "/v1/completions", json=question.body) as response:
        if response.status_code != 200:
            answer.errors.append((response.status_code, await response.aread()))
            return answer
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                answer.dones += 1
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    answer.errors.append(event["error"])
                for choice in event.get("choices", ()):
                    answer.text += choice["text"]
                    if choice["finish_reason"]:
                        answer.finish_reasons.append(choice["finish_reason"])
                if event.get("usage"):
                    answer.usages.append(event["usage"]["completion_tokens"])
    return answer


async def faults(cluster: Cluster, chance: random.Random, count: int) -> None:
    """One after another, of every kind; an engine is back before the next one is hurt."""
    kinds = [
        ("kill", cluster.engines),
        ("freeze", cluster.engines),
        ("drain", cluster.engines),
        ("kill", cluster.sidecars),
        ("kill", cluster.routers),
        ("drain", cluster.routers),
    ]
    order = list(itertools.islice(itertools.cycle(chance.sample(kinds, len(kinds))), count))
    for kind, names in order:
        name = chance.choice(names)
        print(f"{kind} {name}")
        await getattr(cluster, kind)(name)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, tiny_checkpoint(tmp_path / "tiny"), num_routers=2, num_engines=3)
    yield cluster
    for name in [*cluster.routers, *cluster.engines, *cluster.sidecars, "gateway"]:
        assert "Traceback" not in cluster.log(name), cluster.log(name)


@pytest.mark.timeout(600)
async def test_no_stream_breaks(cluster: Cluster) -> None:
    """Without it a restart, a crash or a hang anywhere behind the gateway is an error in somebody's face."""
    seed = int(os.environ.get("QUIRE_CHAOS_SEED") or random.SystemRandom().getrandbits(32))
    print(f"QUIRE_CHAOS_SEED={seed}")
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with cluster.running(), httpx.AsyncClient(base_url=cluster.url, timeout=180, limits=limits) as http:
        asked = questions("tiny")
        undisturbed = dict(zip(map(id, asked), await asyncio.gather(*(ask(http, q) for q in asked)), strict=True))
        assert all(answer.whole for answer in undisturbed.values()), undisturbed
        over = asyncio.Event()
        given: list[tuple[Question, Answer]] = []

        async def client(first: int) -> None:
            for question in itertools.islice(itertools.cycle(asked), first, None):
                given.append((question, await ask(http, question)))
                if over.is_set():
                    return

        async with asyncio.TaskGroup() as clients:
            for index in range(NUM_STREAMS):
                clients.create_task(client(index))
            await faults(cluster, random.Random(seed), int(os.environ.get("QUIRE_CHAOS_FAULTS") or 6))
            over.set()
        await cluster.until_idle()
    print(f"{len(given)} streams")
    assert len(given) >= 2 * NUM_STREAMS
    for question, answer in given:
        expected = undisturbed[id(question)]
        assert answer.whole, answer
        assert answer == expected
        if question.constrained and answer.finish_reasons == ["stop"]:
            jsonschema.validate(json.loads(answer.text), SCHEMA)

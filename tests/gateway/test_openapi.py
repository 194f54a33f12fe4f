"""The OpenAPI page against what is served: routes, bodies, answers, and schemathesis with all three."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from fake_router import FakeRouter
from gateway_testing import MODEL
from malformed_requests import (
    BAD_CHATS,
    BAD_COMPLETIONS,
    BAD_DETOKENIZE,
    BAD_TOKENIZE,
    CHAT,
    DETOKENIZE,
    TEXT,
    TOKENIZE,
)

from quire.gateway.openai import answers, types
from quire.gateway.openai.openapi import ENDPOINTS, openapi_page
from quire.gateway.server import Gateway

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
PAGE = openapi_page(MODEL)

CHATS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 2, "seed": 2**64 - 1, "stop": ["x"], "logit_bias": {"5": -100}},
    {"tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
    {"structured_outputs": {"choice": ["a"]}, "min_p": 0.5, "top_k": -1, "ignore_eos": False, "store": False},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "prompt_logprobs": 1},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 2, "best_of": 2},
    {"prompt": [[5, 6], [7]], "max_tokens": 3, "prompt_logprobs": 0},
    {"prompt": [5, 6], "max_tokens": 0, "echo": True},
]


def validator(name: str) -> Any:
    schema = {"$ref": f"#/components/schemas/{name}", "components": PAGE["components"]}
    return jsonschema.Draft202012Validator(schema)


def assert_is(answer: type[msgspec.Struct], raw: bytes) -> None:
    """All of `raw` is in the struct, and matches the page's schema of it."""
    assert msgspec.to_builtins(msgspec.json.decode(raw, type=answer)) == json.loads(raw)
    validator(answer.__name__).validate(json.loads(raw))


async def test_page_is_served_and_is_openapi(http: httpx.AsyncClient) -> None:
    """Without it the page could be another's, or nothing that a tool can read."""
    page = (await http.get("/openapi.json")).json()
    assert page == json.loads(json.dumps(PAGE))
    operations = [operation for path in page["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations) == len(ENDPOINTS)
    for schema in page["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


async def test_every_path_of_the_page_is_there(http: httpx.AsyncClient) -> None:
    """Without it the page could promise what is not served, or its examples not work."""
    for path, operations in PAGE["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody")
            example = body["content"]["application/json"]["example"] if body else None
            response = await http.request(method, path.replace("{name}", MODEL), json=example)
            assert response.status_code == 200, path
            (kind, *_) = operation["responses"]["200"]["content"]
            assert response.headers["content-type"].startswith(kind)
            other = "GET" if method == "post" else "POST"
            assert (await http.request(other, path.replace("{name}", MODEL))).status_code == 405


@pytest.mark.parametrize(
    ("path", "base", "bodies", "whole", "event"),
    [
        ("/v1/chat/completions", CHAT, CHATS, answers.ChatCompletion, answers.ChatCompletionChunk),
        ("/v1/completions", TEXT, COMPLETIONS, answers.TextCompletion, answers.TextCompletionChunk),
    ],
    ids=["chat", "completions"],
)
async def test_answers_and_events_are_what_the_page_says(
    http: httpx.AsyncClient,
    path: str,
    base: dict[str, Any],
    bodies: list[dict[str, Any]],
    whole: type[msgspec.Struct],
    event: type[msgspec.Struct],
) -> None:
    """Without it a field could be in an answer and not on the page; events are not encoded from the structs."""
    body_schema = validator("ChatBody" if whole is answers.ChatCompletion else "CompletionBody")
    for fields in bodies:
        body_schema.validate(base | fields)
        response = await http.post(path, json=base | fields)
        assert response.status_code == 200, response.text
        assert_is(whole, response.content)
        streaming = {**base, **fields, "stream": True, "stream_options": {"include_usage": True}}
        streaming.pop("prompt_logprobs", None)
        response = await http.post(path, json=streaming)
        *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert done == "[DONE]"
        for line in events:
            assert_is(event, line.encode())


async def test_small_answers_are_what_the_page_says(http: httpx.AsyncClient, router: FakeRouter) -> None:
    """Without it probes and clients that list models would not be told the truth."""
    for path, answer in (
        ("/v1/models", answers.ModelList),
        (f"/v1/models/{MODEL}", answers.ModelObject),
        ("/health", answers.Health),
        ("/ready", answers.Readiness),
        ("/nowhere", answers.ErrorBody),
    ):
        assert_is(answer, (await http.get(path)).content)
    tokens = await http.post("/tokenize", json={"prompt": "Hello you", "return_token_strs": True})
    assert_is(answers.TokenizeAnswer, tokens.content)
    back = await http.post("/detokenize", json={"tokens": tokens.json()["tokens"]})
    assert_is(answers.DetokenizeAnswer, back.content)
    assert back.json() == {"prompt": "Hello you"}


@pytest.mark.parametrize(
    ("body_type", "base", "table"),
    [
        (types.ChatBody, CHAT, BAD_CHATS),
        (types.CompletionBody, TEXT, BAD_COMPLETIONS),
        (types.TokenizeBody, TOKENIZE, BAD_TOKENIZE),
        (types.DetokenizeBody, DETOKENIZE, BAD_DETOKENIZE),
    ],
)
def test_bodies_that_do_not_decode_do_not_match_the_page(
    body_type: type[msgspec.Struct], base: dict[str, Any], table: list[tuple[Mapping[str, Any], str]]
) -> None:
    """Without it the page could allow a field or a type that the decoder refuses."""
    matches = validator(body_type.__name__).is_valid
    for fields, _ in table:
        if len(str(fields)) > 3000:
            continue  # what is nested deeply is no matter of types
        body = base | fields
        try:
            msgspec.json.decode(json.dumps(body).encode(), type=body_type)
        except msgspec.ValidationError:
            assert not matches(body), fields


def test_the_page_says_what_is_not_done_and_within_what() -> None:
    """Without it a client would learn by errors only."""
    chat = PAGE["components"]["schemas"]["ChatBody"]["properties"]
    assert chat["store"]["enum"] == [None, False]
    assert (chat["temperature"]["minimum"], chat["temperature"]["maximum"]) == (0, 2)
    assert chat["top_p"]["exclusiveMinimum"] == 0


@pytest.mark.slow
async def test_schemathesis(gateway: Gateway, tmp_path: Path) -> None:
    """Without it a body that the page allows, or just doesn't, could end in a 5xx or in what the page has not."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json"),
        *("--checks", CHECKS, "--mode", "all", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "10", "--seed", "1", "--no-color", "--request-timeout", "10"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 200)
    assert process.returncode == 0, output.decode()
    assert gateway._sessions.in_flight == 0

"""Everything that can be wrong with a request: a status, OpenAI's error shape, and the field at fault."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any

import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter
from gateway_testing import MODEL
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from quire.gateway.openai.types import ChatBody, CompletionBody
from quire.service.errors import InvalidRequestError

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
SCHEMA = {"name": "x", "schema": {"type": "object"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"} | fields]}


BAD_CHATS: list[tuple[Mapping[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    (message(role="wizard"), "messages[1].role"),
    (message(role="tool"), "messages[1].role"),
    (message(role=None), "messages[1].role"),
    (message(content=None), "messages[1].content"),
    (message(content=7), "messages[1].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": "a"}, {"type": "text"}]), "messages[1].content[1].text"),
    (message(content=[{"type": "text", "text": "a", "image_url": "x"}]), "messages[1].content[0].image_url"),
    (message(content=[{"text": "a"}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text"),
    (message(name="Ann"), "messages[1].name"),
    (message(tool_calls=[{"id": "1"}]), "messages[1].tool_calls"),
    (message(colour="red"), "messages[1].colour"),
    ({"max_token": 5}, "max_token"),
    ({"guided_json": {}}, "guided_json"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 1}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"priority": 2**31}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": 1}, "cache_salt"),
    ({"regex": ""}, "regex"),
    ({"grammar": ""}, "grammar"),
    ({"regex": "a", "grammar": "b"}, "grammar"),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": SCHEMA}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"name": "a b"}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": SCHEMA | {"schema": []}}},
        "response_format.json_schema.schema",
    ),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"n": 0}, "n"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"echo": True}, "echo"),
]

BAD_COMPLETIONS: list[tuple[Mapping[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [3, -1]}, "prompt[1]"),
    ({"prompt": [3, 5, 49152]}, "prompt[2]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": [5] * 8192}, "prompt"),
    ({"prompt": [5] * 8000, "max_tokens": 193}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 0}, "logprobs"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
]


def assert_refused(response: httpx.Response, status: int, param: str | None) -> str:
    """The error's message, after its shape was checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert isinstance(error["message"], str)
    return error["message"]


@pytest.mark.parametrize(
    ("path", "base", "table"),
    [("/v1/chat/completions", CHAT, BAD_CHATS), ("/v1/completions", TEXT, BAD_COMPLETIONS)],
    ids=["chat", "completions"],
)
async def test_wrong_fields_are_named(
    http: httpx.AsyncClient,
    router: FakeRouter,
    subtests: pytest.Subtests,
    path: str,
    base: dict[str, Any],
    table: list[tuple[Mapping[str, Any], str]],
) -> None:
    """Without it a wrong field could be accepted in silence, or its error not say which it was."""
    for index, (fields, param) in enumerate(table):
        with subtests.test(f"{index}: {param}"):
            text = assert_refused(await http.post(path, json=base | fields), 400, param)
            assert param.split(".")[-1].split("[")[0] in text
            assert router.submitted.empty()


BAD_BYTES = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"model=x", "JSON"),
    (b'{"model": "x", "messages": []} {}', "JSON"),
    (b'{"model": NaN}', "JSON"),
    (b'{"model": "\\ud800", "prompt": "x"}', "JSON"),
    (b'{"model": "\xff"}', "UTF-8"),
    (b"[]", "object"),
    (b'{"metadata": ' + b"[" * 200_000, "metadata"),
    (
        b'{"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":' + b'{"a":' * 100_000,
        "deep",
    ),
]


async def test_wrong_bytes(http: httpx.AsyncClient, subtests: pytest.Subtests) -> None:
    """Without it a body that is no JSON object could end in a 500."""
    for body, what in BAD_BYTES:
        with subtests.test(str(body[:40])):
            response = await http.post("/v1/chat/completions", content=body)
            assert response.status_code == 400
            assert what in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"messages": CHAT["messages"]}, {"model": MODEL}])
async def test_missing_fields(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    """Without it a request without a model or messages could be served with something made up."""
    missing = ({"model", "messages"} - set(body)).pop()
    assert missing in assert_refused(await http.post("/v1/chat/completions", json=body), 400, missing)


async def test_messages_say_what_to_do(http: httpx.AsyncClient) -> None:
    """Without it an error could name the field but neither its value nor the fix."""
    cases = {
        "did you mean max_tokens?": {"max_token": 5},
        "temperature is 3.0: it must lie in [0, 2]": {"temperature": 3},
        "n is 2, which is not supported: send the request several times": {"n": 2},
        "max_tokens: expected `int | null`, got `str`": {"max_tokens": "5"},
        "set max_completion_tokens to at most": {"max_completion_tokens": 9000},
        "'text', 'json_object' or 'json_schema'": {"response_format": {"type": "xml"}},
    }
    for expected, fields in cases.items():
        response = await http.post("/v1/chat/completions", json=CHAT | fields)
        assert expected in response.json()["error"]["message"]


async def test_context_numbers(http: httpx.AsyncClient) -> None:
    """Without it a prompt that is too long would be refused without the numbers that tell how much."""
    response = await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 8192})
    text = assert_refused(response, 400, "prompt")
    assert "8192 tokens" in text
    assert "at least 1 token" in text
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert (await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 8191})).status_code == 200
    assert (
        await http.post("/v1/completions", json=TEXT | {"prompt": [5] * 8000, "max_tokens": 192})
    ).status_code == 200


async def test_body_limit(start_gateway: Any, router: FakeRouter) -> None:
    """Without it one request could fill the memory."""
    gateway = await start_gateway(router.address, max_body_bytes=2000)
    long = json.dumps(TEXT | {"prompt": "x" * 3000}).encode()

    async def chunks() -> typing.AsyncIterator[bytes]:
        yield long[:1500]
        yield long[1500:]

    async with httpx.AsyncClient(base_url=gateway.url) as http:
        assert "2000 bytes" in assert_refused(await http.post("/v1/completions", content=long), 413, None)
        assert_refused(await http.post("/v1/completions", content=chunks()), 413, None)
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200


async def test_routes(http: httpx.AsyncClient) -> None:
    """Without it a wrong path or method would be answered in a shape that OpenAI's clients can't read."""
    assert "/v1/chat/completions" in assert_refused(await http.post("/v1/chat"), 404, None)
    assert_refused(await http.get("/"), 404, None)
    assert "POST" in assert_refused(await http.get("/v1/chat/completions"), 405, None)
    assert "GET" in assert_refused(await http.post("/v1/models"), 405, None)


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    """Without it a request for another model would be answered by this one."""
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert MODEL in caught.value.message


def test_every_field_of_the_api_is_known() -> None:
    """Without it a field that the official client offers would be called unknown instead of not supported."""
    chat = typing.get_type_hints(chat_params.CompletionCreateParamsBase).keys() | {"stream"}
    text = typing.get_type_hints(text_params.CompletionCreateParamsBase).keys() | {"stream"}
    assert chat <= set(ChatBody.__struct_fields__)
    assert text <= set(CompletionBody.__struct_fields__)


class TestRefusedByTheEngine:
    """Errors that only the other services find."""

    @pytest.fixture
    def answer(self) -> Answer:
        async def refuse(submission: Any) -> None:
            field = "constraint" if submission.request.constraint else "sampling.temperature"
            submission.send(error=InvalidRequestError(f"{field} can't be done", field=field))

        return refuse

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"regex": "("}, "regex"),
            ({"grammar": "?"}, "grammar"),
            ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format.json_schema.schema"),
            ({}, "temperature"),
        ],
    )
    async def test_names_the_clients_field(
        self, http: httpx.AsyncClient, fields: dict[str, Any], param: str, stream: bool
    ) -> None:
        """Without it a grammar that can't be compiled would be a 200 that breaks off, or name an internal field."""
        response = await http.post("/v1/chat/completions", json=CHAT | fields | {"stream": stream})
        assert_refused(response, 400, param)

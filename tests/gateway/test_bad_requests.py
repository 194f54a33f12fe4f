"""Everything that can be wrong with a request: a status, OpenAI's error shape, and the field at fault."""

from __future__ import annotations

import asyncio
import json
import re
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
from quire.gateway.server import Gateway
from quire.service.errors import InvalidRequestError

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
SCHEMA = {"name": "x", "schema": {"type": "object"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"} | fields]}


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "now"} | fields}]}


def called(**fields: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}} | fields
    return message(role="assistant", content=None, tool_calls=[call])


NOW = tool()
DEEP: dict[str, Any] = {}
for _ in range(900):
    DEEP = {"a": DEEP}

BAD_COMMON: list[tuple[Mapping[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"max_token": 5}, "max_token"),
    ({"Temperature": 1}, "Temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"min_tokens": 100_000}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 1e300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"frequency_penalty": "much"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"49152": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 1}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": "word"}, "bad_words"),
    ({"bad_words": ["a"] * 257}, "bad_words"),
    ({"bad_words": ["a b c d " * 20]}, "bad_words"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"ignore_eos": True, "regex": "a"}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"priority": 2**31}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": 1}, "cache_salt"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**12}, "n"),
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
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "{}", "regex": "a"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"schema": {}}}, "structured_outputs.schema"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": "not json"}, "guided_json"),
    ({"guided_json": []}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"request_id": "mine"}, "request_id"),
    ({"vllm_xargs": DEEP}, "vllm_xargs"),
]

BAD_CHATS: list[tuple[Mapping[str, Any], str]] = [
    *BAD_COMMON,
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    (message(role="wizard"), "messages[1].role"),
    (message(role="function"), "messages[1].role"),
    (message(role=""), "messages[1].role"),
    (message(role=None), "messages[1].role"),
    (message(role="tool"), "messages[1].tool_call_id"),
    (message(tool_call_id="c1"), "messages[1].tool_call_id"),
    (message(reasoning_content="hm"), "messages[1].reasoning_content"),
    (message(content=None), "messages[1].content"),
    (message(content=7), "messages[1].content"),
    (message(role="assistant", content=None), "messages[1].content"),
    (message(role="assistant", content=None, tool_calls=[]), "messages[1].content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": "a"}, {"type": "text"}]), "messages[1].content[1].text"),
    (message(content=[{"type": "text", "text": "a", "image_url": "x"}]), "messages[1].content[0].image_url"),
    (message(content=[{"text": "a"}]), "messages[1].content[0].type"),
    (message(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text"),
    (message(name=5), "messages[1].name"),
    (message(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{}"}}]), "messages[1].tool_calls"),
    (message(colour="red"), "messages[1].colour"),
    (called(id=None), "messages[1].tool_calls[0].id"),
    (called(type="custom"), "messages[1].tool_calls[0].type"),
    (called(function={"name": "now"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": {}}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": "{"}), "messages[1].tool_calls[0].function.arguments"),
    (called(function={"name": "now", "arguments": "[]"}), "messages[1].tool_calls[0].function.arguments"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"function": {"name": "now"}}]}, "tools[0].type"),
    ({"tools": [*NOW["tools"], *NOW["tools"]]}, "tools[1].function.name"),
    ({"tools": NOW["tools"] * 129}, "tools"),
    (tool(name=""), "tools[0].function.name"),
    (tool(name="a b"), "tools[0].function.name"),
    (tool(name="a" * 65), "tools[0].function.name"),
    (tool(parameters="{}"), "tools[0].function.parameters"),
    (tool(parameters={"type": "string"}), "tools[0].function.parameters.type"),
    (tool(colour="red"), "tools[0].function.colour"),
    ({"tool_choice": "required"}, "tool_choice"),
    (NOW | {"tool_choice": "some"}, "tool_choice"),
    (NOW | {"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    (NOW | {"tool_choice": {"type": "function", "function": {"name": "then"}}}, "tool_choice.function.name"),
    (NOW | {"tool_choice": {"type": "custom", "custom": {"name": "now"}}}, "tool_choice.custom"),
    (NOW | {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
    (
        NOW
        | {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "x"}}]},
            }
        },
        "tool_choice.allowed_tools.tools[0].function.name",
    ),
    (NOW | {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    (NOW | {"parallel_tool_calls": False, "ignore_eos": True}, "ignore_eos"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "x"}}, "function_call"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"store": True}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"prompt": "hi"}, "prompt"),
]

BAD_COMPLETIONS: list[tuple[Mapping[str, Any], str]] = [
    *BAD_COMMON,
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [3, -1]}, "prompt[1]"),
    ({"prompt": [3, 5, 49152]}, "prompt[2]"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"prompt": [5] * 8192}, "prompt"),
    ({"prompt": [5] * 8000, "max_tokens": 193}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"echo": 1}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"tools": []}, "tools"),
]

BAD_TOKENIZE: list[tuple[Mapping[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"messages": CHAT["messages"]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"tools": []}, "tools"),
    ({"add_generation_prompt": True}, "add_generation_prompt"),
    ({"prompt": None, "messages": []}, "messages"),
    ({"prompt": None, "messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
    ({"return_token_strs": 1}, "return_token_strs"),
    ({"temperature": 1}, "temperature"),
]

BAD_DETOKENIZE: list[tuple[Mapping[str, Any], str]] = [
    ({"tokens": None}, "tokens"),
    ({"tokens": "x"}, "tokens"),
    ({"tokens": [-1]}, "tokens[0]"),
    ({"tokens": [5, 49152]}, "tokens[1]"),
    ({"prompt": "x"}, "prompt"),
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
    [
        ("/v1/chat/completions", CHAT, BAD_CHATS),
        ("/v1/completions", TEXT, BAD_COMPLETIONS),
        ("/tokenize", {"prompt": "hi"}, BAD_TOKENIZE),
        ("/detokenize", {"tokens": [5]}, BAD_DETOKENIZE),
    ],
    ids=["chat", "completions", "tokenize", "detokenize"],
)
async def test_wrong_fields_are_named(
    http: httpx.AsyncClient,
    gateway: Gateway,
    router: FakeRouter,
    subtests: pytest.Subtests,
    path: str,
    base: dict[str, Any],
    table: list[tuple[Mapping[str, Any], str]],
) -> None:
    """Without it a wrong field could be accepted in silence, its error not say which it was, or something be left."""
    tasks = len(asyncio.all_tasks())
    for index, (fields, param) in enumerate(table):
        with subtests.test(f"{index}: {param}"):
            # Python's own encoder writes what JSON has no word for, such as infinity.
            body = json.dumps(base | fields).encode()
            text = assert_refused(await http.post(path, content=body), 400, param)
            assert param.split(".")[-1].split("[")[0] in text
            while not router.submitted.empty():
                pytest.fail(f"it was accepted: {router.submitted.get_nowait().request}")
    await assert_nothing_is_held(gateway, http, tasks)


async def assert_nothing_is_held(gateway: Gateway, http: httpx.AsyncClient, tasks: int) -> None:
    """No request in flight, none waiting for a router, no task more than before."""
    assert gateway._sessions.in_flight == 0
    exposition = (await http.get("/metrics")).text
    in_flight = re.findall(r"^quire_gateway_requests_in_flight\{.*\} (\S+)$", exposition, re.MULTILINE)
    assert all(float(value) == 0 for value in in_flight)
    assert len(asyncio.all_tasks()) <= tasks


BAD_BYTES = [
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"model=x", "JSON"),
    (b'{"model": "x", "messages": []} {}', "JSON"),
    (b'{"model": NaN}', "JSON"),
    (b'{"temperature": Infinity}', "JSON"),
    (b'{"temperature": 1e999}', "range"),
    (b'{"model": "x", "model"}', "JSON"),
    (b"null", "object"),
    (b'"text"', "object"),
    (b"\xef\xbb\xbf{}", "JSON"),
    (b"\x00", "JSON"),
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
        "store is true, which is not supported: set it to false": {"store": True},
        "name one of now": {**NOW, "tool_choice": {"type": "function", "function": {"name": "x"}}},
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
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
            ({"guided_grammar": "?"}, "guided_grammar"),
            (NOW | {"tool_choice": "required"}, "tools"),
            ({}, "temperature"),
        ],
    )
    async def test_names_the_clients_field(
        self, http: httpx.AsyncClient, fields: dict[str, Any], param: str, stream: bool
    ) -> None:
        """Without it a grammar that can't be compiled would be a 200 that breaks off, or name an internal field."""
        response = await http.post("/v1/chat/completions", json=CHAT | fields | {"stream": stream})
        assert_refused(response, 400, param)

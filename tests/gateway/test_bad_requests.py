"""Everything that can be wrong with a request: a status, OpenAI's error shape, and the field at fault."""

from __future__ import annotations

import asyncio
import json
import re
import typing
from collections.abc import Mapping
from typing import Any

import grpc
import httpx
import openai
import pytest
from fake_router import Answer, FakeRouter, Submission
from gateway_testing import MODEL
from llguidance import LLTokenizer
from malformed_requests import (
    BAD_CHATS,
    BAD_COMPLETIONS,
    BAD_DETOKENIZE,
    BAD_TOKENIZE,
    CHAT,
    DETOKENIZE,
    NOW,
    SCHEMA,
    TEXT,
    TOKENIZE,
    tool,
)
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from quire.gateway.openai.types import ChatBody, CompletionBody
from quire.gateway.server import Gateway
from quire.service.checkpoint import TextModel
from quire.service.errors import InvalidRequestError
from quire.service.grpc_server import channel
from quire.service.request import FinishReason
from quire.sidecar.grammar.compile import build_tokenizer, compile_constraint
from quire.v1 import inference_pb2, inference_pb2_grpc, request_pb2


def schema_format(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


SCHEMA_FIELD = "response_format.json_schema.schema"
IMPOSSIBLE: list[tuple[Mapping[str, Any], str]] = [
    ({"regex": "("}, "regex"),
    ({"regex": "a{5,2}"}, "regex"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"structured_outputs": {"regex": "\\"}}, "structured_outputs.regex"),
    ({"guided_regex": "[z-a]"}, "guided_regex"),
    ({"grammar": "start"}, "grammar"),
    ({"grammar": "begin: 'a'"}, "grammar"),
    ({"guided_grammar": "start: other"}, "guided_grammar"),
    ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs.grammar"),
    (schema_format({"type": "strin"}), SCHEMA_FIELD),
    (schema_format({"type": "string", "minLength": 5, "maxLength": 2}), SCHEMA_FIELD),
    (schema_format({"$ref": "#/$defs/nowhere"}), SCHEMA_FIELD),
    (schema_format({"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}), SCHEMA_FIELD),
    (schema_format({"enum": []}), SCHEMA_FIELD),
    ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 2}}, "guided_json"),
    (tool(parameters={"properties": {"a": {"type": "strin"}}}) | {"tool_choice": "required"}, "tools"),
    (tool(parameters={"properties": {"a": {"not": {}}}}, strict=True), "tools"),
    (NOW | {"tool_choice": "auto", "regex": "("}, "regex"),
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
        ("/tokenize", TOKENIZE, BAD_TOKENIZE),
        ("/detokenize", DETOKENIZE, BAD_DETOKENIZE),
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


@pytest.mark.parametrize(("kind", "what"), [("image_url", "images"), ("input_audio", "audio"), ("file", "files")])
async def test_what_no_model_takes_is_refused_whatever_its_number(
    http: httpx.AsyncClient, kind: str, what: str
) -> None:
    """Without it a client would look for the size or the number that is let in, where none is."""
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:image/png;base64,AAAA"}}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}]}
    text = assert_refused(await http.post("/v1/chat/completions", json=body), 400, "messages[0].content[1].type")
    assert f"'{kind}'" in text and f"take no {what}, not even one; send parts of type 'text'" in text


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


async def test_deep_values_are_nobodys_failure(http: httpx.AsyncClient, subtests: pytest.Subtests) -> None:
    """Without it JSON that can just be read, but not be written again, would be a 500."""
    for depth in (200, 600, 900, 950, 980, 990, 1500):
        deep = '{"a":' * depth + "{}" + "}" * depth
        for where in (
            '"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": %s}}',
            '"structured_outputs": {"json": %s}',
            '"chat_template_kwargs": %s',
            '"store": %s',
            '"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]',
            '"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]',
            '"tools": [{"type": "function", "function": {"name": "f"}}], "guided_json": %s',
        ):
            with subtests.test(f"{depth} {where}"):
                body = json.dumps(CHAT)[:-1] + ", " + where % deep + "}"
                response = await http.post("/v1/chat/completions", content=body)
                assert response.status_code in (200, 400), response.text


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


@pytest.fixture(scope="module")
def tokenizer(text_model: TextModel) -> LLTokenizer:
    return build_tokenizer(text_model)


class TestImpossibleGrammars:
    """Constraints as the sidecar's own compiler refuses them."""

    @pytest.fixture
    def answer(self, tokenizer: LLTokenizer) -> Answer:
        async def compile_first(submission: Submission) -> None:
            assert submission.request.constraint is not None
            try:
                compile_constraint(tokenizer, submission.request.constraint)
            except InvalidRequestError as error:
                submission.send(error=error)
            else:
                submission.send(finish=FinishReason.STOP)

        return compile_first

    async def test_name_the_clients_field(
        self, http: httpx.AsyncClient, gateway: Gateway, subtests: pytest.Subtests
    ) -> None:
        """Without it what can't be compiled would be our failure, or be blamed on a grammar that nobody wrote."""
        tasks = len(asyncio.all_tasks())
        for fields, param in IMPOSSIBLE:
            for stream in (False, True):
                with subtests.test(f"{param} {fields}"):
                    body = CHAT | fields | {"stream": stream}
                    text = assert_refused(await http.post("/v1/chat/completions", json=body), 400, param)
                    assert "constraint." not in text
        await assert_nothing_is_held(gateway, http, tasks)

    async def test_over_grpc(self, gateway: Gateway, subtests: pytest.Subtests) -> None:
        """Without it the same would be an internal error of the public service."""
        async with channel(gateway.grpc_address) as dialed:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(dialed)
            for kind, source in (
                ("regex", "("),
                ("lark", "start"),
                ("json_schema", '{"type": "strin"}'),
                ("lark", ""),
            ):
                with subtests.test(f"{kind} {source}"):
                    constraint = request_pb2.Constraint(**{kind: source})
                    options = inference_pb2.GenerationOptions(constraint=constraint)
                    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x"), options=options)
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await stub.Generate(request)
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                    field = dict(caught.value.trailing_metadata() or ())["quire-field"]
                    assert field == f"options.constraint.{kind}"

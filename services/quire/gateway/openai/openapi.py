"""The OpenAPI page of what is served, made from the structs that decode requests and encode answers.

`http` makes its routes from `ENDPOINTS` too, so the page has every route and no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from quire.gateway.errors import (
    AuthenticationError,
    BodyTooLargeError,
    BusyError,
    MethodNotAllowedError,
    ModelNotFoundError,
    RateLimitError,
    SlowRequestError,
)
from quire.gateway.openai import answers, not_done, types
from quire.gateway.openai.errors import shape_of
from quire.gateway.options import RANGES
from quire.service.errors import (
    CancelledRequestError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    QuireError,
    UnavailableError,
)

_REFERENCE = "#/components/schemas/{name}"
_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"

_ANY_REQUEST = (InvalidRequestError, MethodNotAllowedError, InternalError)
_WITH_KEY = (*_ANY_REQUEST, AuthenticationError)
_NAMES_A_MODEL = (*_WITH_KEY, ModelNotFoundError)
_WITH_BODY = (
    *_NAMES_A_MODEL,
    BodyTooLargeError,
    SlowRequestError,
    CancelledRequestError,
    RateLimitError,
    BusyError,
)
_GENERATES = (*_WITH_BODY, UnavailableError, DeadlineExceededError)

# What passes of fields that are not done, by struct.
_NOT_DONE: Mapping[type[msgspec.Struct], Sequence[not_done.NotDone]] = {
    types.ChatBody: (not_done.IN_BODIES, not_done.IN_CHATS),
    types.CompletionBody: (not_done.IN_BODIES,),
    types.TokenizeBody: (not_done.IN_TOKENIZE,),
    types.StreamOptions: (not_done.IN_STREAM_OPTIONS,),
    types.StructuredOutputs: (not_done.IN_STRUCTURED_OUTPUTS,),
    types.ToolDefinition: (not_done.IN_TOOLS,),
    types.ToolChoiceObject: (not_done.IN_TOOLS,),
    types.ChatMessage: (not_done.IN_MESSAGES,),
    types.ContentPart: (not_done.IN_MESSAGES,),
}
_RANGES = {**RANGES, "max_completion_tokens": RANGES["max_tokens"], "top_logprobs": RANGES["logprobs"]}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path and its one method. `answer` None is plain text; `event` is that of a stream; `errors` may end it.

    `unready` is the answer's struct again where it also comes with 503.
    """

    method: str
    path: str
    summary: str
    answer: type[msgspec.Struct] | None
    errors: Sequence[type[QuireError]] = _WITH_KEY
    body: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None
    example: Mapping[str, Any] | None = None
    unready: bool = False


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "The assistant's next message in a conversation",
        answers.ChatCompletion,
        _GENERATES,
        body=types.ChatBody,
        event=answers.ChatCompletionChunk,
        example={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16},
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        "What comes after a text",
        answers.TextCompletion,
        _GENERATES,
        body=types.CompletionBody,
        event=answers.TextCompletionChunk,
        example={"prompt": "Once upon a time"},
    ),
    Endpoint(
        "POST",
        "/tokenize",
        "The token ids of a text or of a conversation",
        answers.TokenizeAnswer,
        _WITH_BODY,
        body=types.TokenizeBody,
        example={"prompt": "Hello"},
    ),
    Endpoint(
        "POST",
        "/detokenize",
        "The text of token ids",
        answers.DetokenizeAnswer,
        _WITH_BODY,
        body=types.DetokenizeBody,
        example={"tokens": [1, 2, 3]},
    ),
    Endpoint("GET", "/v1/models", "The names that the served model answers to", answers.ModelList),
    Endpoint("GET", "/v1/models/{name}", "One of these names", answers.ModelObject, _NAMES_A_MODEL),
    Endpoint("GET", "/health", "Whether the process is alive", answers.Health, _ANY_REQUEST),
    Endpoint("GET", "/ready", "Whether a request would be taken now", answers.Readiness, _ANY_REQUEST, unready=True),
    Endpoint("GET", "/metrics", "Prometheus metrics", None, _ANY_REQUEST),
    Endpoint("GET", "/openapi.json", "This page", None, _WITH_KEY),
)


def openapi_page(model: str) -> dict[str, Any]:
    """The page, with examples that ask for `model`."""
    structs = {kind for e in ENDPOINTS for kind in (e.body, e.answer, e.event) if kind is not None}
    ordered = [answers.ErrorBody, *sorted(structs, key=lambda kind: kind.__name__)]
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REFERENCE)
    for kind, tables in _NOT_DONE.items():
        _mark_not_done(schemas[kind.__name__], tables)
    for kind in (types.ChatBody, types.CompletionBody):
        _mark_ranges(schemas[kind.__name__], echo=kind is types.CompletionBody)
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, model)
    return {
        "openapi": "3.2.0",
        "info": {"title": "Quire", "version": "1", "summary": "OpenAI's API, with vLLM's extensions."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Nobody needs a key where the gateway has no file of them.
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Endpoint, model: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", endpoint.method.lower() + endpoint.path).strip("_"),
        "summary": endpoint.summary,
        "responses": {"200": _success(endpoint), **_failures(endpoint)},
    }
    if "{name}" in endpoint.path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.body is not None:
        content = {"schema": _reference(endpoint.body), "example": {"model": model, **(endpoint.example or {})}}
        operation["requestBody"] = {"required": True, "content": {_JSON: content}}
    return operation


def _success(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any]
    if endpoint.answer is not None:
        content = {_JSON: {"schema": _reference(endpoint.answer)}}
    elif endpoint.path.endswith(".json"):
        content = {_JSON: {"schema": {"type": "object"}}}
    else:
        content = {_TEXT: {"schema": {"type": "string"}}}
    if endpoint.event is not None:
        # An error that comes too late for a status ends the stream instead.
        event = {"anyOf": [_reference(endpoint.event), _reference(answers.ErrorBody)]}
        json_data = {"type": "string", "contentMediaType": _JSON, "contentSchema": event}
        data = {"anyOf": [{"const": "[DONE]"}, json_data]}
        content[_EVENTS] = {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
    return {"description": "OK", "content": content}


def _failures(endpoint: Endpoint) -> dict[str, Any]:
    failures = {}
    for status in sorted({shape_of(error("")).status for error in endpoint.errors}):
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Client Closed Request"
        failures[str(status)] = {
            "description": phrase,
            "content": {_JSON: {"schema": _reference(answers.ErrorBody)}},
        }
    if endpoint.unready and endpoint.answer is not None:
        failures["503"] = {
            "description": "Not ready",
            "content": {_JSON: {"schema": _reference(endpoint.answer)}},
        }
    return failures


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}


def _mark_not_done(schema: dict[str, Any], tables: Sequence[not_done.NotDone]) -> None:
    for name, described in schema["properties"].items():
        for table in tables:
            if name in table:
                off, advice = table[name]
                described |= {"enum": [None, *off], "description": f"Not done: {advice}."}


def _mark_ranges(schema: dict[str, Any], *, echo: bool) -> None:
    for name, allowed in _RANGES.items():
        described = schema["properties"].get(name)
        if described is None or not any(kind.get("type") in ("integer", "number") for kind in described["anyOf"]):
            continue
        # None at all are fine with echo.
        low = 0 if name == "max_tokens" and echo else allowed.low
        described["exclusiveMinimum" if allowed.low_open else "minimum"] = low
        described["maximum"] = allowed.high

"""The OpenAI-compatible HTTP API: routes, and nothing else. `server` runs it under uvicorn."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.gateway.access.gate import Caller, Gate
from quire.gateway.access.http_access import Authentication
from quire.gateway.core import Core
from quire.gateway.errors import MethodNotAllowedError, RouteNotFoundError
from quire.gateway.http_completions import Completions, HttpLimits
from quire.gateway.http_errors import error_response
from quire.gateway.http_tokenize import Detokenize, Tokenize
from quire.gateway.observation import Observer
from quire.gateway.openai import answers
from quire.gateway.openai.openapi import ENDPOINTS, openapi_page
from quire.gateway.openai.requests import parse_chat, parse_completion
from quire.gateway.openai.responses import model_object
from quire.gateway.output import Operation
from quire.gateway.request_id import HEADER as REQUEST_ID_HEADER
from quire.gateway.request_id import check_request_id, new_request_id
from quire.service.errors import InternalError, InvalidRequestError, QuireError
from quire.service.metrics import CONTENT_TYPE_LATEST, exposition

_JSON = {"content-type": "application/json"}


def application(core: Core, observer: Observer, gate: Gate, registry: CollectorRegistry, limits: HttpLimits) -> ASGIApp:
    """The ASGI application around `core`."""
    created = int(time.time())

    async def models(request: Request) -> Response:
        caller: Caller = request.scope["quire.caller"]
        data = [model_object(core.model, name, created) for name in core.model.names if caller.may_use(name)]
        return _json(answers.ModelList(data))

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        core.model.check_name(name)
        request.scope["quire.caller"].check_model(name)
        return _json(model_object(core.model, name, created))

    async def health(request: Request) -> Response:
        return _json(answers.Health())

    async def ready(request: Request) -> Response:
        ready = core.ready
        status: Literal["ready", "not ready"] = "ready" if ready else "not ready"
        return _json(answers.Readiness(status, core.router_states), 200 if ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(exposition(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    chat = Completions(core, observer, gate, Operation.CHAT, parse_chat, limits)
    text = Completions(core, observer, gate, Operation.TEXT_COMPLETION, parse_completion, limits)
    page = msgspec.json.encode(openapi_page(core.model.name))

    async def openapi(request: Request) -> Response:
        return Response(page, headers=_JSON)

    served: dict[str, Any] = {
        "/v1/chat/completions": chat,
        "/v1/completions": text,
        "/tokenize": Tokenize(core.model, gate, limits),
        "/detokenize": Detokenize(core.model, gate, limits),
        "/v1/models": models,
        "/v1/models/{name}": model,
        "/health": health,
        "/ready": ready,
        "/metrics": metrics,
        "/openapi.json": openapi,
    }
    # A name may hold slashes, which OpenAPI has no word for.
    routes = [
        Route(endpoint.path.replace("{name}", "{name:path}"), served[endpoint.path], methods=[endpoint.method])
        for endpoint in ENDPOINTS
    ]
    handlers = {QuireError: _on_quire_error, HTTPException: _on_http_error, Exception: _on_bug}
    return _RequestIds(Authentication(Starlette(routes=routes, exception_handlers=handlers), gate, error_response))


class _RequestIds:
    """Gives each request its id, the client's X-Request-Id if it sent one, and sends it back with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope).get(REQUEST_ID_HEADER)
        app, request_id = self._app, wanted
        if wanted is not None:
            try:
                check_request_id(wanted)
            except InvalidRequestError as error:
                app, request_id = error_response(error), None
        request_id = request_id or new_request_id()
        scope["quire.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await app(scope, receive, send_with_id)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, headers=_JSON)


async def _on_quire_error(request: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, QuireError) else InternalError(str(error)))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's router found no route, or not this method."""
    if not isinstance(error, HTTPException):
        return await _on_bug(request, error)
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        response = error_response(MethodNotAllowedError(f"{where} does not exist: use {allowed}"))
        response.headers["allow"] = allowed
        return response
    paths = ", ".join(endpoint.path for endpoint in ENDPOINTS)
    return error_response(RouteNotFoundError(f"{where} does not exist: this server has {paths}"))


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again once this is sent, and uvicorn logs it with its traceback.
    return error_response(InternalError("the gateway failed: its log has the reason"))

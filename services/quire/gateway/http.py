"""The OpenAI-compatible HTTP API: routes, and nothing else. `server` runs it under uvicorn."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.gateway.access.deadline import HEADER as TIMEOUT_HEADER
from quire.gateway.access.deadline import Deadline
from quire.gateway.access.gate import Admission, Caller, Gate
from quire.gateway.access.http_access import Authentication
from quire.gateway.core import Core, Generation, Operation, Output
from quire.gateway.errors import AuthenticationError, MethodNotAllowedError, RouteNotFoundError
from quire.gateway.exchange import Exchange
from quire.gateway.observation import Observation, Observer
from quire.gateway.openai.errors import error_body, shape_of
from quire.gateway.openai.requests import ApiRequest, parse_chat, parse_completion
from quire.gateway.openai.responses import DONE, Events, answer_body, error_event, model_object, response_id
from quire.gateway.stream import Result, total_usage
from quire.service.errors import InternalError, InvalidRequestError, OverloadedError, QuireError, UnavailableError
from quire.service.metrics import CONTENT_TYPE_LATEST, exposition
from quire.service.request import TraceContext

_JSON = {"content-type": "application/json"}
_EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Tells nginx to pass each event on at once.
    "x-accel-buffering": "no",
}
_MAX_REQUEST_ID = 256


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """`read_timeout` and `request_timeout` in seconds: for a request's arrival, and for all of it (None: no limit)."""

    max_body_bytes: int
    read_timeout: float
    request_timeout: float | None


def application(core: Core, observer: Observer, gate: Gate, registry: CollectorRegistry, limits: HttpLimits) -> ASGIApp:
    """The ASGI application around `core`."""
    created = int(time.time())

    async def models(request: Request) -> Response:
        caller: Caller = request.scope["quire.caller"]
        data = [model_object(core.model, name, created) for name in core.model.names if caller.may_use(name)]
        return _json({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        core.model.check_name(name)
        request.scope["quire.caller"].check_model(name)
        return _json(model_object(core.model, name, created))

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        status = "ready" if core.ready else "not ready"
        return _json({"status": status, "routers": core.router_states}, 200 if core.ready else 503)

    async def metrics(request: Request) -> Response:
        return Response(exposition(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    chat = _Completions(core, observer, gate, Operation.CHAT, parse_chat, limits)
    text = _Completions(core, observer, gate, Operation.TEXT_COMPLETION, parse_completion, limits)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    handlers = {QuireError: _on_quire_error, HTTPException: _on_http_error, Exception: _on_bug}
    return _RequestIds(Authentication(Starlette(routes=routes, exception_handlers=handlers), gate, _error_response))


class _Completions:
    """POST of one of the two generation routes."""

    def __init__(
        self,
        core: Core,
        observer: Observer,
        gate: Gate,
        operation: Operation,
        parse: Callable[[bytes], ApiRequest],
        limits: HttpLimits,
    ) -> None:
        self._core = core
        self._observer = observer
        self._gate = gate
        self._operation = operation
        self._parse = parse
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller = scope["quire.caller"]
        exchange = Exchange(scope, receive, send, lambda: self._gate.headers(caller))
        headers = exchange.request.headers
        trace = TraceContext(headers.get("traceparent", ""), headers.get("tracestate", ""))
        with self._observer.observe(self._operation, "http", scope["quire.request_id"], trace) as seen:
            try:
                deadline = Deadline(headers.get(TIMEOUT_HEADER), self._limits.request_timeout)
                with self._gate.enter(caller) as admission:
                    body = await exchange.body(self._limits.max_body_bytes, self._limits.read_timeout)
                    await exchange.while_connected(self._answer(exchange, body, admission, deadline, seen), deadline)
            except QuireError as error:
                seen.failed(error)
                await _answer_error(exchange, error)

    async def _answer(
        self, exchange: Exchange, body: bytes, admission: Admission, deadline: Deadline, seen: Observation
    ) -> None:
        request = self._parse(body)
        self._core.model.check_name(request.model)
        admission.caller.check_model(request.model)
        options = admission.options(request.options)
        answer_id = response_id(self._operation, uuid.uuid4().hex)
        try:
            generations = [
                await self._core.prepare(
                    answer_id if len(request.prompts) == 1 else f"{answer_id}-{index}",
                    prompt,
                    options,
                    trace=seen.trace,
                    deadline_unix_ms=deadline.unix_ms,
                )
                for index, prompt in enumerate(request.prompts)
            ]
            seen.prepared(request.model, generations, answer_id, stream=request.stream)
            admission.start(generations)
            with self._core.open(generations, admission.counting(seen.progress)) as output:
                await output.begun()
                answer = self._stream if request.stream else self._whole
                await answer(exchange, request, generations, output, answer_id, seen)
        except QuireError as error:
            raise request.in_its_terms(error) from error

    async def _whole(
        self,
        exchange: Exchange,
        request: ApiRequest,
        generations: list[Generation],
        output: Output,
        answer_id: str,
        seen: Observation,
    ) -> None:
        texts: list[list[str]] = [[] for _ in generations]
        ends: dict[int, Result] = {}
        async for index, event in output:
            if isinstance(event, str):
                texts[index].append(event)
            else:
                ends[index] = event
        results = [ends[index] for index in range(len(generations))]
        body = answer_body(
            self._operation,
            answer_id=answer_id,
            model=request.model,
            created=int(time.time()),
            texts=["".join(parts) for parts in texts],
            results=results,
        )
        seen.finished(results)
        await exchange.start(200, _JSON | {"content-length": str(len(body))})
        await exchange.finish(body)

    async def _stream(
        self,
        exchange: Exchange,
        request: ApiRequest,
        generations: list[Generation],
        output: Output,
        answer_id: str,
        seen: Observation,
    ) -> None:
        events = Events(
            self._operation,
            answer_id=answer_id,
            model=request.model,
            created=int(time.time()),
            choices=len(generations),
            include_usage=request.include_usage,
        )
        results = []
        await exchange.start(200, _EVENT_STREAM)
        if opening := b"".join(events.begin(index) for index in range(len(generations))):
            await exchange.write(opening)
        async for index, event in output:
            if isinstance(event, str):
                await exchange.write(events.text(index, event))
            else:
                results.append(event)
                await exchange.write(events.end(index, event))
        seen.finished(results)
        await exchange.finish((events.usage(total_usage(results)) if request.include_usage else b"") + DONE)


class _RequestIds:
    """Gives each request its id, the client's X-Request-Id if it sent one, and sends it back with the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = Headers(scope=scope).get("x-request-id")
        usable = wanted is not None and 0 < len(wanted) <= _MAX_REQUEST_ID and wanted.isascii() and wanted.isprintable()
        request_id = wanted if wanted is not None and usable else f"req-{uuid.uuid4().hex}"
        scope["quire.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        if wanted is not None and not usable:
            error = InvalidRequestError(
                f"X-Request-Id has {len(wanted)} characters: send 1 to {_MAX_REQUEST_ID}, printable ASCII",
                field="X-Request-Id",
            )
            await _error_response(error)(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)


async def _answer_error(exchange: Exchange, error: QuireError) -> None:
    if exchange.complete:
        return
    if exchange.started:
        await exchange.finish(error_event(error))
        return
    response = _error_response(error)
    await exchange.start(response.status_code, dict(response.headers))
    await exchange.finish(bytes(response.body))


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, headers=_JSON)


def _error_response(error: QuireError) -> Response:
    headers = dict(_JSON)
    if isinstance(error, OverloadedError | UnavailableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after or 1)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), shape_of(error).status, headers=headers)


async def _on_quire_error(request: Request, error: Exception) -> Response:
    return _error_response(error if isinstance(error, QuireError) else InternalError(str(error)))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's router found no route, or not this method."""
    if not isinstance(error, HTTPException):
        return await _on_bug(request, error)
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        response = _error_response(MethodNotAllowedError(f"{where} does not exist: use {allowed}"))
        response.headers["allow"] = allowed
        return response
    return _error_response(
        RouteNotFoundError(
            f"{where} does not exist: this server has /v1/chat/completions, "
            "/v1/completions, /v1/models, /health, /ready and /metrics"
        )
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again once this is sent, and uvicorn logs it with its traceback.
    return _error_response(InternalError("the gateway failed: its log has the reason"))

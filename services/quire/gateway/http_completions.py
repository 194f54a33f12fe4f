"""The two routes that generate: POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from quire.gateway.access.deadline import HEADER as TIMEOUT_HEADER
from quire.gateway.access.deadline import Deadline
from quire.gateway.access.gate import Admission, Caller, Gate
from quire.gateway.answer import Answer
from quire.gateway.core import Core
from quire.gateway.deltas import Score, Scores
from quire.gateway.exchange import Exchange
from quire.gateway.http_errors import answer_error
from quire.gateway.observation import Observation, Observer
from quire.gateway.openai.requests import ApiRequest
from quire.gateway.openai.responses import DONE, Events, Head, answer_body, response_id
from quire.gateway.output import Generation, Operation, Output
from quire.gateway.stream import Result, total_usage
from quire.service.errors import QuireError
from quire.service.request import TraceContext

_JSON = {"content-type": "application/json"}
_EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Tells nginx to pass each event on at once.
    "x-accel-buffering": "no",
}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """`read_timeout` and `request_timeout` in seconds: for a request's arrival, and for all of it (None: no limit)."""

    max_body_bytes: int
    read_timeout: float
    request_timeout: float | None


class Completions:
    """One of the two routes, as an ASGI application."""

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
                await answer_error(exchange, error)

    async def _answer(
        self, exchange: Exchange, body: bytes, admission: Admission, deadline: Deadline, seen: Observation
    ) -> None:
        seen.asked(body)
        request = self._parse(body)
        self._core.model.check_name(request.model)
        admission.caller.check_model(request.model)
        options = admission.options(request.options)
        answer_id = response_id(self._operation, uuid.uuid4().hex)
        head = Head(self._operation, answer_id, request.model, int(time.time()))
        try:
            generations: list[Generation] = []
            for index, prompt in enumerate(request.prompts):
                generations += await self._core.prepare(
                    answer_id if len(request.prompts) == 1 else f"{answer_id}-{index}",
                    prompt,
                    options,
                    trace=seen.trace,
                    deadline_unix_ms=deadline.unix_ms,
                )
            seen.prepared(request.model, generations, answer_id, stream=request.stream)
            admission.start(generations, options.n)
            with self._core.open(generations, admission.counting(seen.progress)) as output:
                await output.begun()
                answer = self._stream if request.stream else self._whole
                await answer(exchange, request, head, generations, output, seen)
        except QuireError as error:
            raise request.in_its_terms(error) from error

    async def _whole(
        self,
        exchange: Exchange,
        request: ApiRequest,
        head: Head,
        generations: list[Generation],
        output: Output,
        seen: Observation,
    ) -> None:
        outputs = [Answer() for _ in generations]
        ends: dict[int, Result] = {}
        async for index, event in output:
            if isinstance(event, Result):
                ends[index] = event
            else:
                outputs[index].add(event)
        results = [ends[index] for index in range(len(generations))]
        choices = request.options.n
        body = answer_body(head, self._core.model.pieces, generations, outputs, results, choices=choices)
        seen.finished(results, choices)
        await exchange.start(200, _JSON | {"content-length": str(len(body))})
        await exchange.finish(body)

    async def _stream(
        self,
        exchange: Exchange,
        request: ApiRequest,
        head: Head,
        generations: list[Generation],
        output: Output,
        seen: Observation,
    ) -> None:
        count = len(generations)
        events = Events(head, self._core.model.pieces, choices=count, include_usage=request.include_usage)
        ends: dict[int, Result] = {}
        scores: list[list[Score]] = [[] for _ in generations]
        await exchange.start(200, _EVENT_STREAM)
        if opening := b"".join(events.begin(index) for index in range(count)):
            await exchange.write(opening)
        async for index, event in output:
            if isinstance(event, str) and not scores[index]:
                await exchange.write(events.text(index, event))
            elif isinstance(event, Scores):
                scores[index] += event.tokens
            elif isinstance(event, Result):
                ends[index] = event
                await exchange.write(events.end(index, event, scores[index]))
            else:
                await exchange.write(events.part(index, event, scores[index]))
                scores[index] = []
        results = [ends[index] for index in range(count)]
        seen.finished(results, request.options.n)
        usage = total_usage(results, request.options.n)
        await exchange.finish((events.usage(usage) if request.include_usage else b"") + DONE)

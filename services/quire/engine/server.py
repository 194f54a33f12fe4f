"""The sessions of routers, over gRPC. Translates; `hub` and the core do the work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, format_trace_id

from quire.engine.hub import Client, Hub
from quire.engine.phase import Phase, PhaseState
from quire.engine.sidecar_client import SidecarClient
from quire.service.errors import InvalidRequestError, NotFoundError, QuireError, UnavailableError
from quire.service.grpc_server import abort
from quire.service.logs import facts_of
from quire.service.request import Finished, FinishReason, Request, Update
from quire.service.tracing import parent_context, trace_context
from quire.service.wire import request_from_proto, update_to_proto
from quire.v1 import session_pb2, session_pb2_grpc

logger = logging.getLogger(__name__)


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """One `Session` call per router."""

    def __init__(self, name: str, phase: PhaseState, hub: Hub, sidecar: SidecarClient | None, tracer: Tracer) -> None:
        self._name = name
        self._phase = phase
        self._hub = hub
        self._sidecar = sidecar
        self._tracer = tracer

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterator[session_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[session_pb2.SessionRequest, session_pb2.SessionResponse],
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        """Reads frames in the background and yields what the hub deals to this session."""
        if self._phase.phase is not Phase.READY:
            await abort(context, UnavailableError(f"the engine is {self._phase.phase.name.lower()}: try another"))
        session = _Session(self._name, self._phase, self._hub, self._sidecar, self._tracer)
        reader = asyncio.create_task(session.read(request_iterator))
        draining = asyncio.create_task(session.announce_drain())
        try:
            welcome = session_pb2.Welcome(server=self._name, model=self._phase.model)
            yield session_pb2.SessionResponse(welcome=welcome)
            while (frame := await session.frames.get()) is not None:
                yield frame
            await reader
        except InvalidRequestError as error:
            await abort(context, error)
        finally:
            reader.cancel()
            draining.cancel()
            session.close()


@dataclass(slots=True)
class _InFlight:
    """What is told of a request when it ends: its span, and one line in the log."""

    span: Span
    request_id: str
    prompt_tokens: int
    began: float
    cached_tokens: int = 0
    output_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0

    def end(self, reason: str, error: QuireError | None) -> None:
        """It has had its terminal event, or nobody waits for it any more."""
        span = self.span
        span.set_attribute("gen_ai.usage.output_tokens", self.output_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", [reason])
        facts: dict[str, object] = {
            "request_id": self.request_id,
            "trace_id": format_trace_id(span.get_span_context().trace_id),
            "reason": reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "seconds": round(time.perf_counter() - self.began, 4),
        }
        if self.accepted_drafts or self.rejected_drafts:
            drafts = {"accepted_drafts": self.accepted_drafts, "rejected_drafts": self.rejected_drafts}
            span.set_attributes({f"quire.speculation.{name}": count for name, count in drafts.items()})
            facts |= drafts
        if error is not None:
            span.set_attribute("error.type", error.code.value)
            span.set_status(StatusCode.ERROR, error.message)
            facts |= facts_of(error)
        span.end()
        logger.info("request", extra=facts)


class _Session:
    """A router's requests on this engine."""

    def __init__(self, name: str, phase: PhaseState, hub: Hub, sidecar: SidecarClient | None, tracer: Tracer) -> None:
        self.frames: asyncio.Queue[session_pb2.SessionResponse | None] = asyncio.Queue()
        self._name = name
        self._phase = phase
        self._hub = hub
        self._sidecar = sidecar
        self._tracer = tracer
        self._client = Client(self._deliver)
        self._in_flight: dict[int, _InFlight] = {}
        self._compiling: dict[int, asyncio.Task[None]] = {}

    async def read(self, frames: AsyncIterator[session_pb2.SessionRequest]) -> None:
        """Takes the router's frames until it hangs up; raises InvalidRequestError if it breaks the protocol."""
        try:
            async for frame in frames:
                match frame.WhichOneof("frame"):
                    case "submit":
                        self._submit(frame.submit)
                    case "cancel":
                        self._cancel(frame.cancel.key)
                    case "hello":
                        logger.info("session opened", extra={"peer": frame.hello.peer})
                    case unknown:
                        raise InvalidRequestError(f"a session frame holds {unknown}: upgrade this engine")
        finally:
            self.frames.put_nowait(None)

    async def announce_drain(self) -> None:
        """Tells the router when the engine begins to drain."""
        await self._phase.until(Phase.DRAINING)
        self.frames.put_nowait(session_pb2.SessionResponse(draining=session_pb2.Draining()))

    def close(self) -> None:
        """The stream is over: everything still in flight on it is cancelled."""
        for task in self._compiling.values():
            task.cancel()
        self._hub.leave(self._client)
        for request in self._in_flight.values():
            request.end("cancelled", UnavailableError("the session ended first"))

    def _submit(self, submit: session_pb2.Submit) -> None:
        key = submit.key
        if key in self._in_flight:
            raise InvalidRequestError(f"key {key} is in use: a session's keys are unique", field="key")
        try:
            request = request_from_proto(submit.request)
            self._check(request)
        except QuireError as error:
            self._refuse(submit, error)
            return
        span = self._tracer.start_span(
            f"generate {request.model}",
            context=parent_context(request.trace),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.model": request.model,
                "gen_ai.request.max_tokens": request.stop.max_tokens,
                "gen_ai.request.temperature": request.sampling.temperature,
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "quire.engine": self._name,
                "quire.request_id": request.request_id,
            },
        )
        self._in_flight[key] = _InFlight(span, request.request_id, len(request.prompt_token_ids), time.perf_counter())
        if request.constraint is None:
            self._hub.submit(self._client, key, request)
        else:
            self._compiling[key] = asyncio.create_task(self._compile_and_submit(key, request, span))

    def _check(self, request: Request) -> None:
        if self._phase.phase is not Phase.READY:
            raise UnavailableError(f"the engine is {self._phase.phase.name.lower()}: try another")
        model = self._hub.ready.model if self._hub.ready else ""
        if request.model != model:
            raise NotFoundError(f"model {request.model} is not served here: this engine runs {model}", field="model")
        if request.constraint is not None and self._sidecar is None:
            raise InvalidRequestError(
                "constraint is set and this engine has no sidecar: start one and name it with --sidecar",
                field="constraint",
            )

    async def _compile_and_submit(self, key: int, request: Request, span: Span) -> None:
        """Has the sidecar compile the grammar before the core hears of the request, so that no step waits for it."""
        if request.constraint is None or self._sidecar is None:
            return
        try:
            await self._sidecar.compile(request.constraint, trace_context(span), request.cache_key.salt)
        except QuireError as error:
            self._deliver([Update(key, finished=Finished(FinishReason.ERROR, error))])
        else:
            span.add_event("grammar compiled")
            self._hub.submit(self._client, key, request)
        finally:
            self._compiling.pop(key, None)

    def _cancel(self, key: int) -> None:
        compiling = self._compiling.pop(key, None)
        if compiling is None:
            self._hub.cancel(self._client, key)
        else:
            compiling.cancel()
            self._deliver([Update(key, finished=Finished(FinishReason.CANCELLED))])

    def _refuse(self, submit: session_pb2.Submit, error: QuireError) -> None:
        facts = {"request_id": submit.request.request_id, "traceparent": submit.request.trace.traceparent}
        logger.info("request refused", extra={**facts, **facts_of(error)})
        update = Update(submit.key, finished=Finished(FinishReason.ERROR, error))
        self._send([update])

    def _deliver(self, updates: list[Update]) -> None:
        for update in updates:
            self._trace(update)
        self._send(updates)

    def _send(self, updates: list[Update]) -> None:
        frame = session_pb2.StepFrame(updates=[update_to_proto(update) for update in updates])
        for update in frame.updates:
            if update.HasField("started"):
                update.started.engine = self._name
        self.frames.put_nowait(session_pb2.SessionResponse(step=frame))

    def _trace(self, update: Update) -> None:
        request = self._in_flight[update.key]
        if update.started is not None:
            request.cached_tokens = update.started.cached_tokens
            request.span.add_event("started")
            request.span.set_attribute("gen_ai.usage.cache_read.input_tokens", update.started.cached_tokens)
        if update.token_ids:
            if not request.output_tokens:
                request.span.add_event("first token")
            request.output_tokens += len(update.token_ids)
        if update.drafts is not None:
            request.accepted_drafts += update.drafts.accepted
            request.rejected_drafts += update.drafts.rejected
        if update.finished is not None:
            del self._in_flight[update.key]
            request.end(update.finished.reason.value.lower(), update.finished.error)

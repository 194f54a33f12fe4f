"""The public gRPC service, quire.v1.InferenceService: the same core as the HTTP API, in the contract's messages."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from quire.gateway.access.gate import Caller, Gate
from quire.gateway.access.grpc_access import authorization
from quire.gateway.core import Core, Operation
from quire.gateway.model import Conversation, Prompt
from quire.gateway.observation import Observer
from quire.gateway.options import Options
from quire.gateway.request_id import HEADER as REQUEST_ID_HEADER
from quire.gateway.request_id import check_request_id
from quire.gateway.stream import Result
from quire.service.chat import Message
from quire.service.errors import CancelledRequestError, InvalidRequestError, QuireError
from quire.service.grpc_server import abort
from quire.service.request import TraceContext
from quire.service.wire import constraint_from_proto
from quire.v1 import inference_pb2, inference_pb2_grpc, request_pb2

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_GenerateRequest: TypeAlias = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
_Emit: TypeAlias = Callable[[str, str | Result], Awaitable[None]]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates; a call that its client cancels is cancelled here and frees its pages."""

    def __init__(self, core: Core, observer: Observer, gate: Gate, *, write_timeout: float = 30.0) -> None:
        self._core = core
        self._write_timeout = write_timeout
        self._gate = gate
        self._observer = observer

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> inference_pb2.GenerateResponse:
        """The whole text in one answer."""
        texts: list[str] = []
        response = inference_pb2.GenerateResponse(model=request.model or self._core.model.name)

        async def collect(request_id: str, event: str | Result) -> None:
            if isinstance(event, str):
                texts.append(event)
                return
            response.request_id = request_id
            response.finish_reason = _finish_reason(event)
            response.usage.CopyFrom(_usage(event))

        await self._run(request, context, collect, stream=False)
        response.text = "".join(texts)
        return response

    # A coroutine that writes, not a generator: a cancelled call must clean up at once, and a generator that is
    # dropped between two messages does so only when it is collected.
    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateStreamRequest, context: _Context
    ) -> None:
        """The text as it comes; the last message has the finish reason and the usage."""

        async def write(request_id: str, event: str | Result) -> None:
            message = inference_pb2.GenerateStreamResponse(request_id=request_id)
            if isinstance(event, str):
                message.text = event
            else:
                message.finish_reason = _finish_reason(event)
                message.usage.CopyFrom(_usage(event))
            await self._write(context, message)

        await self._run(request, context, write, stream=True)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """Every name that the served model answers to."""
        model = self._core.model
        caller = self._caller(context)
        names = [
            inference_pb2.Model(name=name, max_model_len=model.max_model_len)
            for name in model.names
            if caller.may_use(name)
        ]
        return inference_pb2.ListModelsResponse(models=names)

    async def _write(self, context: _Context, message: inference_pb2.GenerateStreamResponse) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await context.write(message)
        except TimeoutError as error:
            self._gate.reader_stalled("grpc")
            raise CancelledRequestError(
                f"the client has read nothing for {self._write_timeout:g} s: read faster, or ask for less at once"
            ) from error

    def _caller(self, context: _Context) -> Caller:
        return self._gate.caller(authorization(context.invocation_metadata()))

    async def _run(self, request: _GenerateRequest, context: _Context, emit: _Emit, *, stream: bool) -> None:
        """Emits each new text and at last the Result; ends the call with the status of the error that came instead."""
        metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
        trace = TraceContext(metadata.get("traceparent", ""), metadata.get("tracestate", ""))
        operation = Operation.CHAT if request.prompt.HasField("chat") else Operation.TEXT_COMPLETION
        request_id = f"gen-{uuid.uuid4().hex}"
        client_id = metadata.get(REQUEST_ID_HEADER.lower(), request_id)
        try:
            check_request_id(client_id)
            caller = self._caller(context)
            with (
                self._observer.observe(operation, "grpc", client_id, trace) as seen,
                self._gate.enter(caller) as admission,
            ):
                await context.send_initial_metadata(((REQUEST_ID_HEADER.lower(), client_id),))
                seen.asked(request)
                model = request.model or self._core.model.name
                self._core.model.check_name(model)
                caller.check_model(model)
                generations = await self._core.prepare(
                    request_id,
                    _prompt(request),
                    admission.options(_options(request.options)),
                    trace=seen.trace,
                    deadline_unix_ms=_deadline(context.time_remaining()),
                )
                seen.prepared(model, generations, request_id, stream=stream)
                admission.start(generations)
                with self._core.open(generations, admission.counting(seen.progress)) as output:
                    async for _, event in output:
                        if isinstance(event, str | Result):
                            await emit(request_id, event)
                        if isinstance(event, Result):
                            seen.finished([event])
        except QuireError as error:
            await abort(context, _in_contract_terms(error))


def _prompt(request: _GenerateRequest) -> Prompt:
    match request.prompt.WhichOneof("kind"):
        case "text":
            return request.prompt.text
        case "token_ids":
            return tuple(request.prompt.token_ids.token_ids)
        case "chat":
            messages = request.prompt.chat.messages
            return Conversation(tuple(Message(message.role, message.content) for message in messages))
        case _:
            raise InvalidRequestError("prompt is missing: set one of text, token_ids, chat", field="prompt")


def _options(options: inference_pb2.GenerationOptions) -> Options:
    constraint = constraint_from_proto(options.constraint) if options.HasField("constraint") else None
    return Options(
        max_tokens=options.max_tokens if options.HasField("max_tokens") else None,
        temperature=options.temperature if options.HasField("temperature") else None,
        top_p=options.top_p if options.HasField("top_p") else None,
        top_k=options.top_k if options.HasField("top_k") else None,
        seed=options.seed if options.HasField("seed") else None,
        stop=tuple(options.stop),
        constraint=constraint,
        constraint_field=f"constraint.{constraint.kind.value}" if constraint else "",
        priority=options.priority,
    )


def _deadline(remaining: float | None) -> int | None:
    return None if remaining is None else int((time.time() + remaining) * 1000)


def _in_contract_terms(error: QuireError) -> QuireError:
    """The core's and the services' names of fields are not this contract's: it nests them."""
    field = error.field.removeprefix("sampling.").removeprefix("stop.")
    top = field.partition(".")[0].partition("[")[0]
    if top == "messages":
        field = f"prompt.chat.{field}"
    elif top in inference_pb2.GenerationOptions.DESCRIPTOR.fields_by_name:
        field = f"options.{field}"
    elif field.startswith("prompt["):
        field = field.replace("prompt[", "prompt.token_ids.token_ids[", 1)
    return error if field == error.field else type(error)(error.message, field=field)


def _finish_reason(result: Result) -> request_pb2.FinishReason.ValueType:
    return request_pb2.FinishReason.Value(f"FINISH_REASON_{result.finish_reason.value}")


def _usage(result: Result) -> inference_pb2.Usage:
    usage = result.usage
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )

"""The public gRPC service, quire.v1.InferenceService: the same core as the HTTP API, in the contract's messages."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from quire.gateway import grpc_answers
from quire.gateway.access.gate import Caller, Gate
from quire.gateway.access.grpc_access import authorization
from quire.gateway.answer import Answer
from quire.gateway.core import Core
from quire.gateway.deltas import Delta, Scores
from quire.gateway.errors import stalled_reader
from quire.gateway.grpc_requests import in_contract_terms, read_options, read_prompt
from quire.gateway.observation import Observer
from quire.gateway.output import Generation, Operation
from quire.gateway.request_id import HEADER as REQUEST_ID_HEADER
from quire.gateway.request_id import check_request_id
from quire.gateway.stream import Result, total_usage
from quire.service.errors import QuireError
from quire.service.grpc_server import abort
from quire.service.request import TraceContext
from quire.v1 import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

_GenerateRequest: TypeAlias = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Running:
    """A request that is being generated, `generations` of one prompt."""

    id: str
    generations: Sequence[Generation]


_Emit: TypeAlias = Callable[[_Running, int, Delta | Result], Awaitable[None]]


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
        outputs: dict[int, Answer] = defaultdict(Answer)
        ends: dict[int, Result] = {}

        async def collect(running: _Running, index: int, event: Delta | Result) -> None:
            if isinstance(event, Result):
                ends[index] = event
            else:
                outputs[index].add(event)

        running = await self._run(request, context, collect, stream=False)
        pieces = self._core.model.pieces
        results = [ends[index] for index in range(len(running.generations))]
        choices = [grpc_answers.choice(outputs[index], result, pieces) for index, result in enumerate(results)]
        return inference_pb2.GenerateResponse(
            request_id=running.id,
            model=request.model or self._core.model.name,
            choices=choices,
            usage=grpc_answers.usage(total_usage(results, len(results))),
            prompt_logprobs=grpc_answers.prompt_logprobs(running.generations[0], results[0], pieces),
        )

    # A coroutine that writes, not a generator: a cancelled call must clean up at once, and a generator that is
    # dropped between two messages does so only when it is collected.
    async def GenerateStream(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateStreamRequest, context: _Context
    ) -> None:
        """The text as it comes; each choice's last message has its finish reason, the stream's last the usage."""
        pieces = self._core.model.pieces
        ends: dict[int, Result] = {}
        scores: dict[int, Scores] = {}

        async def write(running: _Running, index: int, event: Delta | Result) -> None:
            if isinstance(event, Scores):
                earlier = scores[index].tokens if index in scores else ()
                scores[index] = Scores(earlier + event.tokens)
                return
            message = inference_pb2.GenerateStreamResponse(request_id=running.id, choice=index)
            if index in scores:
                grpc_answers.put(message, scores.pop(index), pieces)
            if isinstance(event, Result):
                ends[index] = event
                message.finish_reason = grpc_answers.finish_reason(event)
                if len(ends) == len(running.generations):
                    results = [ends[index] for index in range(len(ends))]
                    message.usage.CopyFrom(grpc_answers.usage(total_usage(results, len(results))))
            else:
                grpc_answers.put(message, event, pieces)
            await self._write(context, message)

        await self._run(request, context, write, stream=True)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        """A prompt's token ids, as Generate would compute them."""
        try:
            with self._gate.enter(self._caller(context)):
                self._check_model(request.model, context)
                tokenized = await self._core.model.tokenize(read_prompt(request.prompt))
        except QuireError as error:
            await abort(context, in_contract_terms(error))
        return inference_pb2.TokenizeResponse(
            token_ids=tokenized.token_ids, max_model_len=self._core.model.max_model_len
        )

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: _Context
    ) -> inference_pb2.DetokenizeResponse:
        """The text of token ids."""
        try:
            with self._gate.enter(self._caller(context)):
                self._check_model(request.model, context)
                self._core.model.codec.check_token_ids(request.token_ids, "tokens")
                text = await self._core.model.detokenize(request.token_ids)
        except QuireError as error:
            await abort(context, in_contract_terms(error))
        return inference_pb2.DetokenizeResponse(text=text)

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
            raise stalled_reader(self._write_timeout) from error

    def _caller(self, context: _Context) -> Caller:
        return self._gate.caller(authorization(context.invocation_metadata()))

    def _check_model(self, name: str, context: _Context) -> None:
        model = name or self._core.model.name
        self._core.model.check_name(model)
        self._caller(context).check_model(model)

    async def _run(self, request: _GenerateRequest, context: _Context, emit: _Emit, *, stream: bool) -> _Running:
        """Emits each choice's Deltas and Result; ends the call with the status of the error that came instead."""
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
                options = admission.options(read_options(request.options, stream=stream))
                generations = await self._core.prepare(
                    request_id,
                    read_prompt(request.prompt),
                    options,
                    trace=seen.trace,
                    deadline_unix_ms=_deadline(context.time_remaining()),
                )
                running = _Running(request_id, generations)
                seen.prepared(model, generations, request_id, stream=stream)
                admission.start(generations, options.n)
                ends: dict[int, Result] = {}
                with self._core.open(generations, admission.counting(seen.progress)) as output:
                    async for index, event in output:
                        await emit(running, index, event)
                        if isinstance(event, Result):
                            ends[index] = event
                seen.finished([ends[index] for index in range(len(ends))], len(ends))
        except QuireError as error:
            await abort(context, in_contract_terms(error), linger=self._write_timeout)
        return running


def _deadline(remaining: float | None) -> int | None:
    return None if remaining is None else int((time.time() + remaining) * 1000)

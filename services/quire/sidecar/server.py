"""quire.v1.GrammarService over the core: translates, and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from opentelemetry.trace import SpanKind, StatusCode, Tracer, format_trace_id

from quire.service.errors import InvalidRequestError, QuireError
from quire.service.grpc_server import abort
from quire.service.request import Constraint, TraceContext
from quire.service.tracing import parent_context
from quire.service.wire import constraint_from_proto, error_to_proto
from quire.sidecar.core import GrammarCore, MaskStream, RowRequest
from quire.v1 import grammar_pb2, grammar_pb2_grpc

SERVICE = grammar_pb2.DESCRIPTOR.services_by_name["GrammarService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]

logger = logging.getLogger(__name__)


class GrammarServicer(grammar_pb2_grpc.GrammarServiceServicer):
    """Compile and Step."""

    def __init__(self, core: GrammarCore, tracer: Tracer) -> None:
        self._core = core
        self._tracer = tracer

    async def Compile(  # noqa: N802
        self, request: grammar_pb2.CompileRequest, context: _Context
    ) -> grammar_pb2.CompileResponse:
        """Compiles into the cache; a span of the caller's trace shows how long it took."""
        span = self._tracer.start_span("compile_grammar", parent_context(_trace(context)), SpanKind.SERVER)
        facts: dict[str, str | int | bool] = {}
        outcome, began = "cancelled", time.perf_counter()
        try:
            constraint = _constraint(request)
            facts |= {"kind": constraint.kind.value, "bytes": len(constraint.source.encode())}
            grammar, facts["cached"] = await self._core.compile(constraint, request.cache_salt)
            outcome = "ok"
            return grammar_pb2.CompileResponse(cached=bool(facts["cached"]), compile_seconds=grammar.seconds)
        except QuireError as error:
            # Its message quotes the constraint, which is the client's own: no matter for the log.
            outcome = error.code.value.lower()
            span.set_status(StatusCode.ERROR, error.message)
            await abort(context, error)
        finally:
            span.set_attributes({f"quire.constraint.{name}": value for name, value in facts.items()})
            span.end()
            seconds = round(time.perf_counter() - began, 4)
            told = {"trace_id": format_trace_id(span.get_span_context().trace_id), "outcome": outcome}
            logger.info("constraint", extra={**told, **facts, "seconds": seconds})

    async def Step(  # noqa: N802
        self, requests: AsyncIterator[grammar_pb2.StepRequest], context: _Context
    ) -> AsyncIterator[grammar_pb2.StepResponse]:
        """One engine core's masks; the stream's end frees all that it held."""
        stream: MaskStream | None = None
        try:
            async for request in requests:
                if stream is None:
                    stream = self._open(request)
                    yield grammar_pb2.StepResponse(opened=grammar_pb2.MasksOpened())
                else:
                    yield await _fill(stream, request)
        except QuireError as error:
            await abort(context, error)
        finally:
            if stream is not None:
                stream.close()

    def _open(self, request: grammar_pb2.StepRequest) -> MaskStream:
        if request.WhichOneof("request") != "open":
            raise InvalidRequestError("the stream's first request must be open", field="open")
        return self._core.open(request.open.path, request.open.rows, request.open.vocab_size)


async def _fill(stream: MaskStream, request: grammar_pb2.StepRequest) -> grammar_pb2.StepResponse:
    if request.WhichOneof("request") != "fill":
        raise InvalidRequestError("every request after the first must be fill", field="fill")
    rows = [_row(row) for row in request.fill.rows]
    rows += _next_rows(request.fill.next)
    filled = await stream.fill(rows, request.fill.released)
    return grammar_pb2.StepResponse(
        filled=grammar_pb2.MasksFilled(
            step=request.fill.step,
            errors=[
                grammar_pb2.RowError(sequence=sequence, error=error_to_proto(error))
                for sequence, error in filled.errors.items()
            ],
            results=[
                grammar_pb2.RowResult(sequence=row.sequence, num_drafts=result.num_drafts, forced=result.forced)
                for row in rows
                if (row.drafts or row.max_forced) and (result := filled.results.get(row.sequence)) is not None
            ],
        )
    )


def _row(row: grammar_pb2.MaskRow) -> RowRequest:
    return RowRequest(
        row.sequence,
        row.row,
        list(row.accepted),
        list(row.drafts),
        row.max_forced,
        constraint_from_proto(row.constraint) if row.HasField("constraint") else None,
        row.cache_salt,
    )


def _next_rows(columns: grammar_pb2.NextMasks) -> list[RowRequest]:
    sequences, rows, accepted = list(columns.sequences), list(columns.rows), list(columns.accepted)
    if not len(sequences) == len(rows) == len(accepted):
        raise InvalidRequestError(
            f"next has {len(sequences)} sequences, {len(rows)} rows and {len(accepted)} accepted: it needs as many",
            field="fill.next",
        )
    return [RowRequest(*row) for row in zip(sequences, rows, zip(accepted, strict=True), strict=True)]


def _constraint(request: grammar_pb2.CompileRequest) -> Constraint:
    if not request.HasField("constraint"):
        raise InvalidRequestError("constraint is missing: the contract requires it", field="constraint")
    return constraint_from_proto(request.constraint)


def _trace(context: _Context) -> TraceContext:
    metadata = dict(context.invocation_metadata() or ())
    return TraceContext(str(metadata.get("traceparent", "")), str(metadata.get("tracestate", "")))

"""`quire.service.request` to and from the contracts' messages.

Who calls this: the gateway (requests out, updates in), the engine's server (the reverse), the router (updates). A
missing required field or an unknown enum value raises InvalidRequestError: nothing is filled in by default here.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message

from quire.service.errors import ErrorCode, InternalError, InvalidRequestError, QuireError, error_of
from quire.service.request import (
    CacheKey,
    Constraint,
    ConstraintKind,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    Started,
    StopConditions,
    TraceContext,
    Update,
)
from quire.v1 import request_pb2, session_pb2


def request_to_proto(request: Request) -> request_pb2.Request:
    """The message that carries `request`, every required field set."""
    message = request_pb2.Request(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=request_pb2.SamplingParams(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            seed=request.sampling.seed,
        ),
        stop=request_pb2.StopConditions(max_tokens=request.stop.max_tokens, stop_token_ids=request.stop.stop_token_ids),
        cache_key=request_pb2.CacheKey(
            salt=request.cache_key.salt,
            adapter=request.cache_key.adapter,
            image_digests=request.cache_key.image_digests,
        ),
        priority=request.priority,
        deadline_unix_ms=request.deadline_unix_ms,
        trace=request_pb2.TraceContext(traceparent=request.trace.traceparent, tracestate=request.trace.tracestate),
    )
    if request.constraint is not None:
        message.constraint.CopyFrom(constraint_to_proto(request.constraint))
    return message


def request_from_proto(message: request_pb2.Request) -> Request:
    """The request in `message`; raises InvalidRequestError that names what is missing or out of range."""
    _require(message, "request_id", "model", "sampling", "stop", "priority")
    _require(message.sampling, "temperature", "top_p", "top_k", "seed", inside="sampling.")
    _require(message.stop, "max_tokens", inside="stop.")
    return Request(
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=SamplingParams(
            temperature=message.sampling.temperature,
            top_p=message.sampling.top_p,
            top_k=message.sampling.top_k,
            seed=message.sampling.seed,
        ),
        stop=StopConditions(max_tokens=message.stop.max_tokens, stop_token_ids=tuple(message.stop.stop_token_ids)),
        constraint=constraint_from_proto(message.constraint) if message.HasField("constraint") else None,
        cache_key=cache_key_from_proto(message.cache_key),
        priority=message.priority,
        deadline_unix_ms=message.deadline_unix_ms if message.HasField("deadline_unix_ms") else None,
        trace=TraceContext(message.trace.traceparent, message.trace.tracestate),
    )


def cache_key_from_proto(message: request_pb2.CacheKey) -> CacheKey:
    """The cache key in `message`; absent parts are empty."""
    return CacheKey(message.salt, message.adapter, tuple(message.image_digests))


def constraint_to_proto(constraint: Constraint) -> request_pb2.Constraint:
    """The message that carries `constraint`."""
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return request_pb2.Constraint(json_object=True)
    message = request_pb2.Constraint()
    setattr(message, constraint.kind.value, constraint.source)
    return message


def constraint_from_proto(message: request_pb2.Constraint) -> Constraint:
    """The constraint in `message`; raises InvalidRequestError if none or a false json_object is set."""
    name = message.WhichOneof("kind")
    if name is None:
        raise InvalidRequestError(
            "constraint has no kind: set one of json_schema, regex, lark, json_object", field="constraint"
        )
    if name == "json_object":
        if not message.json_object:
            raise InvalidRequestError(
                "constraint.json_object is false: set it to true or leave constraint out",
                field="constraint.json_object",
            )
        return Constraint(ConstraintKind.JSON_OBJECT)
    return Constraint(ConstraintKind(name), getattr(message, name))


def update_to_proto(update: Update) -> session_pb2.RequestUpdate:
    """The message that carries `update`."""
    message = session_pb2.RequestUpdate(key=update.key, token_ids=update.token_ids)
    if update.started is not None:
        message.started.cached_tokens = update.started.cached_tokens
        message.started.engine = update.started.engine
    if update.finished is not None:
        message.finished.reason = request_pb2.FinishReason.Value(f"FINISH_REASON_{update.finished.reason.value}")
        if update.finished.error is not None:
            message.finished.error.CopyFrom(error_to_proto(update.finished.error))
    return message


def update_from_proto(message: session_pb2.RequestUpdate) -> Update:
    """The update in `message`; raises InternalError if the peer sent a value that this version does not know."""
    started = finished = None
    if message.HasField("started"):
        started = Started(message.started.cached_tokens, message.started.engine)
    if message.HasField("finished"):
        finished = finished_from_proto(message.finished)
    return Update(message.key, tuple(message.token_ids), started, finished)


def finished_from_proto(message: session_pb2.Finished) -> Finished:
    """The terminal event in `message`; raises InternalError on an unknown or unspecified reason."""
    name = _enum_name(request_pb2.FinishReason.items(), message.reason, "FINISH_REASON_")
    reason = FinishReason(name)
    error = error_from_proto(message.error) if message.HasField("error") else None
    if (reason is FinishReason.ERROR) != (error is not None):
        raise InternalError(f"a peer sent finish reason {reason.value} {'with' if error else 'without'} an error")
    return Finished(reason, error)


def error_to_proto(error: QuireError) -> request_pb2.Error:
    """The message that carries `error`."""
    code = request_pb2.ErrorCode.Value(f"ERROR_CODE_{error.code.value}")
    return request_pb2.Error(code=code, message=error.message, field=error.field)


def error_from_proto(message: request_pb2.Error) -> QuireError:
    """The error in `message`, as one of the tree."""
    name = _enum_name(request_pb2.ErrorCode.items(), message.code, "ERROR_CODE_")
    return error_of(ErrorCode(name), message.message, message.field)


def _enum_name(items: Iterable[tuple[str, int]], value: int, prefix: str) -> str:
    for name, number in items:
        if number == value and not name.endswith("_UNSPECIFIED"):
            return name.removeprefix(prefix)
    raise InternalError(f"a peer sent {prefix.lower()}{value}, which this version does not know: upgrade it")


def _require(message: Message, *names: str, inside: str = "") -> None:
    for name in names:
        if not message.HasField(name):
            raise InvalidRequestError(f"{inside}{name} is missing: the contract requires it", field=inside + name)

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
    PromptLogprobs,
    Request,
    SamplingParams,
    Started,
    StopConditions,
    TokenLogprobs,
    TraceContext,
    Update,
    VerifiedDrafts,
)
from quire.v1 import request_pb2, session_pb2

_REQUIRED_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def request_to_proto(request: Request) -> request_pb2.Request:
    """The message that carries `request`, every required field set."""
    message = request_pb2.Request(
        request_id=request.request_id,
        model=request.model,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        sampling=_sampling_to_proto(request.sampling),
        stop=request_pb2.StopConditions(
            max_tokens=request.stop.max_tokens,
            stop_token_ids=request.stop.stop_token_ids,
            min_tokens=request.stop.min_tokens,
            ignore_eos=request.stop.ignore_eos,
        ),
        cache_key=request_pb2.CacheKey(
            salt=request.cache_key.salt,
            adapter=request.cache_key.adapter,
            image_digests=request.cache_key.image_digests,
        ),
        priority=request.priority,
        deadline_unix_ms=request.deadline_unix_ms,
        trace=request_pb2.TraceContext(traceparent=request.trace.traceparent, tracestate=request.trace.tracestate),
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )
    if request.constraint is not None:
        message.constraint.CopyFrom(constraint_to_proto(request.constraint))
    return message


def request_from_proto(message: request_pb2.Request) -> Request:
    """The request in `message`; raises InvalidRequestError that names what is missing or out of range."""
    _require(message, "request_id", "model", "sampling", "stop", "priority")
    _require(message.sampling, *_REQUIRED_SAMPLING, inside="sampling.")
    _require(message.stop, "max_tokens", "min_tokens", "ignore_eos", inside="stop.")
    return Request(
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=_sampling_from_proto(message.sampling),
        stop=StopConditions(
            max_tokens=message.stop.max_tokens,
            stop_token_ids=tuple(message.stop.stop_token_ids),
            min_tokens=message.stop.min_tokens,
            ignore_eos=message.stop.ignore_eos,
        ),
        constraint=constraint_from_proto(message.constraint) if message.HasField("constraint") else None,
        cache_key=cache_key_from_proto(message.cache_key),
        priority=message.priority,
        deadline_unix_ms=message.deadline_unix_ms if message.HasField("deadline_unix_ms") else None,
        trace=TraceContext(message.trace.traceparent, message.trace.tracestate),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def _sampling_to_proto(sampling: SamplingParams) -> request_pb2.SamplingParams:
    return request_pb2.SamplingParams(
        **{name: getattr(sampling, name) for name in _REQUIRED_SAMPLING},
        logit_bias=[request_pb2.LogitBias(token_id=token, bias=bias) for token, bias in sampling.logit_bias],
        bad_words=[request_pb2.TokenSequence(token_ids=word) for word in sampling.bad_words],
    )


def _sampling_from_proto(message: request_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        **{name: getattr(message, name) for name in _REQUIRED_SAMPLING},
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        bad_words=tuple(tuple(word.token_ids) for word in message.bad_words),
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
    if update.logprobs:
        message.logprobs.extend(map(_logprobs_to_proto, update.logprobs))
    if update.prompt_logprobs is not None:
        message.prompt_logprobs.first = update.prompt_logprobs.first
        message.prompt_logprobs.tokens.extend(map(_logprobs_to_proto, update.prompt_logprobs.tokens))
    if update.drafts is not None:
        message.drafts.accepted, message.drafts.rejected = update.drafts
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
    started = finished = prompt_logprobs = None
    if message.HasField("started"):
        started = Started(message.started.cached_tokens, message.started.engine)
    if message.HasField("finished"):
        finished = finished_from_proto(message.finished)
    if message.HasField("prompt_logprobs"):
        tokens = tuple(map(logprobs_from_proto, message.prompt_logprobs.tokens))
        prompt_logprobs = PromptLogprobs(message.prompt_logprobs.first, tokens)
    logprobs = tuple(map(logprobs_from_proto, message.logprobs))
    drafts = None
    if message.HasField("drafts"):
        drafts = VerifiedDrafts(message.drafts.accepted, message.drafts.rejected)
    return Update(message.key, tuple(message.token_ids), started, finished, logprobs, prompt_logprobs, drafts)


def _logprobs_to_proto(logprobs: TokenLogprobs) -> session_pb2.TokenLogprobs:
    tokens, values = zip(*logprobs.top, strict=True) if logprobs.top else ((), ())
    return session_pb2.TokenLogprobs(
        logprob=logprobs.logprob, rank=logprobs.rank, top_token_ids=tokens, top_logprobs=values
    )


def logprobs_from_proto(message: session_pb2.TokenLogprobs) -> TokenLogprobs:
    """What `message` says of a token; raises InternalError if its lists don't match."""
    tokens, values = message.top_token_ids, message.top_logprobs
    if len(tokens) != len(values):
        raise InternalError(f"a peer sent {len(tokens)} most likely tokens with {len(values)} log-probabilities")
    return TokenLogprobs(message.logprob, message.rank, tuple(zip(tokens, values, strict=True)))


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
    return request_pb2.Error(code=code, message=error.message, field=error.field, retry_after_seconds=error.retry_after)


def error_from_proto(message: request_pb2.Error) -> QuireError:
    """The error in `message`, as one of the tree."""
    name = _enum_name(request_pb2.ErrorCode.items(), message.code, "ERROR_CODE_")
    retry_after = message.retry_after_seconds if message.HasField("retry_after_seconds") else None
    return error_of(ErrorCode(name), message.message, message.field, retry_after)


def _enum_name(items: Iterable[tuple[str, int]], value: int, prefix: str) -> str:
    for name, number in items:
        if number == value and not name.endswith("_UNSPECIFIED"):
            return name.removeprefix(prefix)
    raise InternalError(f"a peer sent {prefix.lower()}{value}, which this version does not know: upgrade it")


def _require(message: Message, *names: str, inside: str = "") -> None:
    for name in names:
        if not message.HasField(name):
            raise InvalidRequestError(f"{inside}{name} is missing: the contract requires it", field=inside + name)

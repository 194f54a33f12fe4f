"""What is seen of one request from outside: its span, its metrics and its line in the log.

Both servers wrap each generation request in an Observation. It is the one place that knows when a request began, had
its first token and ended, and how; prompts pass through it only to be logged, if that was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from types import TracebackType

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.util.types import AttributeValue

from quire.gateway.metrics import GatewayMetrics
from quire.gateway.output import Generation, Operation
from quire.gateway.stream import Result, total_usage
from quire.service.errors import CancelledRequestError, ErrorCode, InternalError, QuireError
from quire.service.request import ConstraintKind, TraceContext
from quire.service.tracing import parent_context, trace_context

# Not the fault of the one who asked: these are worth a warning and a failed span.
_OUR_FAULTS = frozenset(
    {ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.DEADLINE_EXCEEDED, ErrorCode.RESOURCE_EXHAUSTED}
)
_JSON = frozenset({ConstraintKind.JSON_SCHEMA, ConstraintKind.JSON_OBJECT})

logger = logging.getLogger(__name__)


class Observer:
    """Makes the Observation of each request of a process."""

    def __init__(self, tracer: Tracer, metrics: GatewayMetrics, *, log_prompts: bool = False) -> None:
        self._tracer = tracer
        self._metrics = metrics
        self._log_prompts = log_prompts

    def observe(self, operation: Operation, api: str, request_id: str, parent: TraceContext) -> Observation:
        """A request has arrived over `api`, "http" or "grpc"; `parent` is its sender's trace context."""
        return Observation(self._tracer, self._metrics, operation, api, request_id, parent, self._log_prompts)


class Observation:
    """Use it as a context manager: an exception that leaves its block is how the request ended."""

    def __init__(
        self,
        tracer: Tracer,
        metrics: GatewayMetrics,
        operation: Operation,
        api: str,
        request_id: str,
        parent: TraceContext,
        log_prompts: bool,
    ) -> None:
        self._metrics = metrics
        self._log_prompts = log_prompts
        self._operation = operation.value
        self._api = api
        self._request_id = request_id
        self._began = time.perf_counter()
        self._first_token: float | None = None
        self._last_token = 0.0
        self._ended = False
        self._facts: dict[str, object] = {"request_id": request_id}
        self._inter_token = metrics.inter_token.labels(self._operation)
        self._span = tracer.start_span(
            self._operation,
            context=parent_context(parent),
            kind=SpanKind.SERVER,
            attributes={gen_ai.GEN_AI_OPERATION_NAME: self._operation, gen_ai.GEN_AI_PROVIDER_NAME: "quire"},
        )
        metrics.in_flight.labels(self._operation, api).inc()

    @property
    def trace(self) -> TraceContext:
        """What the request carries to the router, so that its spans become children of this one's."""
        return trace_context(self._span)

    def __enter__(self) -> Observation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, QuireError):
            self.failed(error)
        elif isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self.failed(CancelledRequestError("the client went away"))
        elif error is not None:
            self.failed(InternalError(f"{type(error).__name__}: {error}"))
        elif not self._ended:
            self.failed(InternalError("the request ended without a result"))

    def asked(self, body: object) -> None:
        """The request as it came: the one place that logs prompts, and only if the operator wants it."""
        if self._log_prompts:
            text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
            logger.info("request", extra={"request_id": self._request_id, "body": text})

    def prepared(self, model: str, generations: Sequence[Generation], answer_id: str, *, stream: bool) -> None:
        """The request is understood: `model` is what the client called it."""
        if self._span.is_recording():
            self._span.update_name(f"{self._operation} {model}")
            self._span.set_attributes(_asked(model, generations[0], answer_id, stream=stream))
        self._facts |= {"answer_id": answer_id, "model": model}

    def progress(self, tokens: int) -> None:
        """`tokens` more output tokens have come. Called at every step, so it does little."""
        now = time.perf_counter()
        if self._first_token is None:
            self._first_token = now - self._began
            self._metrics.time_to_first_token.labels(self._operation).observe(self._first_token)
        else:
            self._inter_token.observe(now - self._last_token)
        self._last_token = now

    def finished(self, results: Sequence[Result], choices: int = 1) -> None:
        """All outputs have ended well; there are `choices` of each prompt."""
        usage = total_usage(results, choices)
        reasons = [result.finish_reason.value.lower() for result in results]
        self._metrics.input_tokens.inc(usage.prompt_tokens)
        self._metrics.cached_input_tokens.inc(usage.cached_tokens)
        self._metrics.output_tokens.inc(usage.completion_tokens)
        self._span.set_attributes(
            {
                gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: reasons,
                gen_ai.GEN_AI_USAGE_INPUT_TOKENS: usage.prompt_tokens,
                gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: usage.cached_tokens,
                gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: usage.completion_tokens,
            }
        )
        self._facts |= {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish_reason": ",".join(dict.fromkeys(reasons)),
        }
        self._end("ok", logging.INFO)

    def failed(self, error: QuireError) -> None:
        """It ended with `error`. Only the first end counts."""
        if self._ended:
            return
        outcome = error.code.value.lower()
        ours = error.code in _OUR_FAULTS
        self._span.set_attribute(error_attributes.ERROR_TYPE, outcome)
        if ours:
            self._span.set_status(Status(StatusCode.ERROR, error.message))
            self._facts["error"] = error.message
        elif error.field:
            self._facts["field"] = error.field
        self._end(outcome, logging.WARNING if ours else logging.INFO)

    def _end(self, outcome: str, level: int) -> None:
        self._ended = True
        duration = time.perf_counter() - self._began
        self._metrics.in_flight.labels(self._operation, self._api).dec()
        self._metrics.requests.labels(self._operation, self._api, outcome).inc()
        self._metrics.duration.labels(self._operation, self._api, outcome).observe(duration)
        if self._first_token is not None:
            self._span.set_attribute(gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK, self._first_token)
            self._facts["ttft_ms"] = round(self._first_token * 1000, 1)
        self._facts["duration_ms"] = round(duration * 1000, 1)
        self._facts["trace_id"] = f"{self._span.get_span_context().trace_id:032x}"
        logger.log(level, "%s over %s: %s", self._operation, self._api, outcome, extra=self._facts)
        self._span.end()


def _asked(model: str, generation: Generation, answer_id: str, *, stream: bool) -> dict[str, AttributeValue]:
    request = generation.request
    attributes: dict[str, AttributeValue] = {
        gen_ai.GEN_AI_REQUEST_MODEL: model,
        gen_ai.GEN_AI_RESPONSE_MODEL: request.model,
        gen_ai.GEN_AI_RESPONSE_ID: answer_id,
        gen_ai.GEN_AI_REQUEST_MAX_TOKENS: request.stop.max_tokens,
        gen_ai.GEN_AI_REQUEST_TEMPERATURE: request.sampling.temperature,
        gen_ai.GEN_AI_REQUEST_TOP_P: request.sampling.top_p,
        # OTLP's integers are signed.
        gen_ai.GEN_AI_REQUEST_SEED: (request.sampling.seed + 2**63) % 2**64 - 2**63,
        gen_ai.GEN_AI_REQUEST_STREAM: stream,
        gen_ai.GEN_AI_OUTPUT_TYPE: "json" if request.constraint and request.constraint.kind in _JSON else "text",
    }
    if request.sampling.top_k:
        attributes[gen_ai.GEN_AI_REQUEST_TOP_K] = request.sampling.top_k
    if generation.shown.stop:
        attributes[gen_ai.GEN_AI_REQUEST_STOP_SEQUENCES] = generation.shown.stop
    return attributes

"""The transport-free request: what the gateway builds, the router passes on and the engine runs.

Plain frozen dataclasses that import nothing but the standard library, so that the offline API can use them without
protobuf. Each validates itself when it is made; the error names the field as the contract does.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from quire.service.errors import InvalidRequestError, QuireError

MAX_TOKEN_ID = 2**31 - 1
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 32
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20


class FinishReason(Enum):
    """How a request ended; the values are the names of `quire.v1.FinishReason` without their prefix."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"
    ERROR = "ERROR"


class ConstraintKind(Enum):
    """The kinds of `quire.v1.Constraint`; the values are its field names."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    JSON_OBJECT = "json_object"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole output must match. `source` is the schema, regex or grammar; empty for JSON_OBJECT."""

    kind: ConstraintKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn: see `quire.v1.SamplingParams` for what each field means and their order.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other penalties 0 are
    off. `logit_bias` is (token, bias) pairs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check_range("sampling.temperature", self.temperature, 0.0, 100.0)
        _check_range("sampling.top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_range("sampling.top_k", self.top_k, 0, MAX_TOKEN_ID)
        _check_range("sampling.seed", self.seed, 0, 2**64 - 1)
        _check_range("sampling.min_p", self.min_p, 0.0, 1.0)
        _check_range("sampling.presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("sampling.frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("sampling.repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_size("sampling.logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias:
            _check_range("sampling.logit_bias", token, 0, MAX_TOKEN_ID)
            _check_range("sampling.logit_bias", bias, -100.0, 100.0)
        _check_size("sampling.bad_words", self.bad_words, MAX_BAD_WORDS)
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise InvalidRequestError(
                    f"sampling.bad_words holds one of {len(word)} tokens: each must have 1 to {MAX_BAD_WORD_TOKENS}",
                    field="sampling.bad_words",
                )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class StopConditions:
    """When the output ends, beside the model's own end tokens (unless `ignore_eos`) and the constraint."""

    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_range("stop.max_tokens", self.max_tokens, 1, MAX_TOKEN_ID)
        _check_range("stop.min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_size("stop.stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _check_range("stop.stop_token_ids", token, 0, MAX_TOKEN_ID)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What else two prefixes must agree in before they share pages: see `quire.service.pages`."""

    salt: str = ""
    adapter: str = ""
    image_digests: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        for digest in self.image_digests:
            if len(digest) != 32:
                raise InvalidRequestError(
                    f"cache_key.image_digests holds a digest of {len(digest)} bytes: each must be a SHA-256, 32 bytes",
                    field="cache_key.image_digests",
                )


@dataclass(frozen=True, slots=True)
class TraceContext:
    """W3C trace context, as the headers carry it; empty when nothing is traced."""

    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate, in token ids. `output_token_ids` are those it generated before it was moved here.

    `logprobs` and `prompt_logprobs` are how many of the most likely tokens to report beside each token; None: nothing.
    """

    request_id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    output_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    cache_key: CacheKey = field(default_factory=CacheKey)
    priority: int = 0
    deadline_unix_ms: int | None = None
    trace: TraceContext = field(default_factory=TraceContext)
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_range("logprobs", self.logprobs or 0, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_LOGPROBS)
        if self.stop.ignore_eos and self.constraint is not None:
            raise InvalidRequestError(
                "stop.ignore_eos is set and so is constraint, whose end is an end token: leave one of them out",
                field="stop.ignore_eos",
            )
        if not self.request_id:
            raise InvalidRequestError("request_id is empty: give each request an id of its own", field="request_id")
        if not self.prompt_token_ids:
            raise InvalidRequestError("the prompt is empty: send at least one token", field="prompt_token_ids")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token's log-probability and rank (1 is the most likely) under the model's own distribution, and the most likely
    tokens with theirs, best first."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Those of the prompt's tokens from position `first` on; after a preemption or a move they come again, the same."""

    first: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """A request was scheduled for the first time; `cached_tokens` of its prompt needed no computing."""

    cached_tokens: int
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """The one terminal event of a request; `error` is set if and only if `reason` is ERROR."""

    reason: FinishReason
    error: QuireError | None = None


class VerifiedDrafts(NamedTuple):
    """Drafts that a step verified for a request: those that are among the update's tokens, and those in vain."""

    accepted: int
    rejected: int


class Update(NamedTuple):
    """What one step did for one request. `key` is whatever the one who submitted it named it.

    A tuple because there is one for every token: making one costs a quarter of a frozen dataclass's time.
    `logprobs` has one for each of `token_ids` if the request asked for them, and is empty if not.
    """

    key: int
    token_ids: tuple[int, ...] = ()
    started: Started | None = None
    finished: Finished | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    drafts: VerifiedDrafts | None = None


def _check_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequestError(f"{name} is {value}: it must be a finite number", field=name)
    if value < low or value > high or (low_open and value == low):
        interval = f"{'(' if low_open else '['}{low}, {high}]"
        raise InvalidRequestError(f"{name} is {value}: it must lie in {interval}", field=name)


def _check_size(name: str, values: Sized, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequestError(f"{name} has {len(values)} entries: at most {limit} are allowed", field=name)

"""What `generate` and `chat` return, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from quire.service.errors import QuireError


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability under the model's own distribution, its rank (1 is the most likely), its text."""

    logprob: float
    rank: int
    decoded_token: str


# The token itself and the most likely ones, by token id.
TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One output. `token_ids` has the end token, or those of the stop string, which `text` leaves out.

    finish_reason: "stop", "length", or "error"; then `error` says which, and the output is what came before it.
    stop_reason: the stop string or the one of `stop_token_ids` that ended it; None for the model's own end token.
    logprobs: one entry per token; cumulative_logprob is their sum. Both are None if they were not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    stop_reason: int | str | None = None
    error: QuireError | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds from the call to the first token and to the end of the prompt's last output."""

    first_token_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its outputs.

    prompt: its text; None if it came as token ids. prompt_logprobs: None, then one entry for each further token of the
    prompt; None as a whole if they were not asked for. num_cached_tokens: those of the prompt whose pages were there.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int
    metrics: RequestMetrics
    finished: bool = True

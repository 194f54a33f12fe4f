"""A prompt's requests for the core, and its outputs while their tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from quire.llm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from quire.llm.prompts import EncodedPrompt
from quire.llm.sampling_params import SamplingParams
from quire.service import request as contract
from quire.service.request import CacheKey, Constraint, FinishReason, Request, Update
from quire.service.text import Detokenizer, OutputText, Pieces

_SEEDS = 2**64

# A token's text by its id, special tokens included.
Decode = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class PreparedParams:
    """Params as the contract has them. `sampling` lacks the seed."""

    params: SamplingParams
    sampling: contract.SamplingParams
    constraint: Constraint | None

    def requests(
        self, request_id: str, model: str, prompt: EncodedPrompt, seed: int, priority: int, max_model_len: int
    ) -> list[Request]:
        """One for each output; the prompt's own log-probabilities are asked for once. Raises InvalidRequestError."""
        params = self.params
        return [
            Request(
                request_id=f"{request_id}-{index}",
                model=model,
                prompt_token_ids=prompt.token_ids,
                sampling=replace(self.sampling, seed=(seed + index) % _SEEDS),
                # A prompt that leaves no room is refused by the core.
                stop=params.stop_conditions(max(max_model_len - len(prompt.token_ids), params.min_tokens, 1)),
                constraint=self.constraint,
                cache_key=CacheKey(prompt.cache_salt),
                priority=priority,
                logprobs=params.logprobs,
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            )
            for index in range(params.n)
        ]


class Output:
    """One output. `take` what the core says of it until `done`; then `result` is complete."""

    def __init__(self, index: int, request: Request, params: SamplingParams, text: OutputText, decode: Decode) -> None:
        self.done = False
        self.cached_tokens = 0
        self.first_token_at: float | None = None
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        self._index = index
        self._request = request
        self._keeps_stop = params.include_stop_str_in_output
        self._stream = text
        self._decode = decode
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[contract.TokenLogprobs] = []
        self._reason = ""
        self._stop_reason: int | str | None = None
        self._finished: contract.Finished | None = None

    def take(self, update: Update) -> None:
        """What a step did for it; once `done`, the core's own end means nothing any more."""
        if self.done:
            return
        if update.started is not None:
            self.cached_tokens = update.started.cached_tokens
        if update.prompt_logprobs is not None:
            self._take_prompt(update.prompt_logprobs)
        if update.token_ids:
            self._take_tokens(update)
        if self._stream.stop_string is not None:
            self._end("stop", self._stream.stop_string)
        elif update.finished is not None:
            self._finish(update.finished)

    def result(self) -> CompletionOutput:
        """The output as it is returned."""
        wanted = self._request.logprobs is not None
        shown = zip(self._token_ids, self._logprobs, strict=False)
        return CompletionOutput(
            index=self._index,
            text="".join(self._text),
            token_ids=self._token_ids,
            cumulative_logprob=sum(token.logprob for token in self._logprobs) if wanted else None,
            logprobs=[_logprobs(token_id, found, self._decode) for token_id, found in shown] if wanted else None,
            finish_reason=self._reason,
            stop_reason=self._stop_reason,
            error=self._finished.error if self._finished is not None else None,
        )

    def _take_tokens(self, update: Update) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        token_ids = update.token_ids
        stopped = update.finished is not None and update.finished.reason is FinishReason.STOP
        if stopped and token_ids[-1] in self._request.stop.stop_token_ids:
            self._stop_reason = token_ids[-1]
        # Like a stop string, a token that the caller named as the end is no part of the text.
        hidden = self._stop_reason is not None and not self._keeps_stop
        before = self._stream.num_tokens
        self._text.append(self._stream.feed(token_ids[:-1] if hidden else token_ids))
        taken = self._stream.num_tokens - before
        if hidden and self._stream.stop_string is None:
            taken += 1
        self._token_ids += token_ids[:taken]
        self._logprobs += update.logprobs[:taken]

    def _take_prompt(self, found: contract.PromptLogprobs) -> None:
        for position, token in enumerate(found.tokens, found.first):
            token_id = self._request.prompt_token_ids[position]
            self.prompt_logprobs[position] = _logprobs(token_id, token, self._decode)

    def _finish(self, finished: contract.Finished) -> None:
        self._finished = finished
        self._text.append(self._stream.flush())
        if self._stream.stop_string is not None:
            self._end("stop", self._stream.stop_string)
        else:
            self._end(finished.reason.value.lower(), self._stop_reason)

    def _end(self, reason: str, stop_reason: int | str | None) -> None:
        self.done = True
        self._reason, self._stop_reason = reason, stop_reason
        if self._keeps_stop and isinstance(stop_reason, str):
            self._text.append(stop_reason)


class Generation:
    """A prompt and its outputs, one for each of `requests`. `began` is on time.perf_counter's clock, in seconds."""

    def __init__(
        self,
        prompt: EncodedPrompt,
        requests: list[Request],
        params: SamplingParams,
        pieces: Pieces,
        decode: Decode,
        *,
        strip_leading: bool,
    ) -> None:
        self.prompt = prompt
        self.requests = requests
        self.outputs = []
        for index, request in enumerate(requests):
            detokenizer = Detokenizer(pieces, strip_leading=strip_leading)
            text = OutputText(detokenizer, params.stop_strings, min_tokens=params.min_tokens)
            self.outputs.append(Output(index, request, params, text, decode))
        self._began = time.perf_counter()
        self._ended = self._began

    @property
    def done(self) -> bool:
        """Whether all outputs have ended."""
        return all(output.done for output in self.outputs)

    def end(self) -> None:
        """Takes the time."""
        self._ended = time.perf_counter()

    def result(self, request_id: str) -> RequestOutput:
        """The prompt and its outputs as they are returned."""
        first_tokens = [output.first_token_at for output in self.outputs if output.first_token_at is not None]
        scored = self.requests[0].prompt_logprobs is not None
        found = self.outputs[0].prompt_logprobs
        return RequestOutput(
            request_id=request_id,
            prompt=self.prompt.text,
            prompt_token_ids=list(self.prompt.token_ids),
            outputs=[output.result() for output in self.outputs],
            prompt_logprobs=[found.get(position) for position in range(len(self.prompt.token_ids))] if scored else None,
            num_cached_tokens=self.outputs[0].cached_tokens,
            metrics=RequestMetrics(min(first_tokens, default=self._ended) - self._began, self._ended - self._began),
        )


def _logprobs(token_id: int, found: contract.TokenLogprobs, decode: Decode) -> TokenLogprobs:
    best = {other: Logprob(logprob, rank, decode(other)) for rank, (other, logprob) in enumerate(found.top, 1)}
    return {token_id: Logprob(found.logprob, found.rank, decode(token_id)), **best}

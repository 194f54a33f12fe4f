"""A call's tokens as text: what the core makes of each step, and how an output ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from quire.gateway.call import Call
from quire.gateway.deltas import Score
from quire.service.errors import CancelledRequestError, InternalError, QuireError, error_of
from quire.service.request import FinishReason, TokenLogprobs
from quire.service.text import Detokenizer, OutputText

_GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class Usage:
    """In tokens. `completion_tokens` counts all up to the end, an end token and those of a stop string included.

    Of what engines drafted, `accepted_prediction_tokens` became output and `rejected_prediction_tokens` did not.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """How an output ended; `finish_reason` is STOP or LENGTH (everything else is raised as an error).

    `calls` counts the tools that it calls. `prompt_logprobs` has one for each prompt token, None for the first, if the
    client asked for them.
    """

    finish_reason: FinishReason
    usage: Usage
    calls: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


def total_usage(results: Sequence[Result], choices: int = 1) -> Usage:
    """The usage of several outputs together, `choices` of each prompt; their prompt counts once."""
    usages = [result.usage for result in results]
    return Usage(
        sum(usage.prompt_tokens for usage in usages[::choices]),
        sum(usage.cached_tokens for usage in usages[::choices]),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.accepted_prediction_tokens for usage in usages),
        sum(usage.rejected_prediction_tokens for usage in usages),
    )


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt's text, and where in it each of its tokens begins if their log-probabilities are asked for."""

    text: str
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an output is shown, and how.

    `end_token_ids` end it and are no part of it. `echo` comes first; `without_output` leaves it at that.
    `prompt_logprobs`: whether the result has them. `constraint_field` is the client's name of the constraint.
    """

    stop: tuple[str, ...] = ()
    end_token_ids: frozenset[int] = frozenset()
    echo: Echo | None = None
    without_output: bool = False
    prompt_logprobs: bool = False
    constraint_field: str = "constraint"


class TextStream:
    """Reads one call. `take`, `take_scores` and `result` never wait: call them, in this order, when it has changed."""

    def __init__(self, call: Call, detokenizer: Detokenizer, shown: Shown) -> None:
        self.call = call
        stop = call.request.stop
        self.scored = call.request.logprobs is not None
        self._text = OutputText(detokenizer, shown.stop, min_tokens=stop.min_tokens)
        self._shown = shown
        self._echo = shown.echo
        self._echo_length = len(shown.echo.text) if shown.echo is not None else 0
        self._stop_token_ids = frozenset(stop.stop_token_ids)
        self._taken = 0
        self._ended = False
        self._reason: FinishReason | None = None
        # Scored tokens wait until their text is out: a stop string may yet take it back.
        self._waiting: deque[Score] = deque()
        self._shown_characters = 0
        # On the path of every token of almost every request.
        self._plain = not (self.scored or shown.without_output or stop.stop_token_ids)

    @property
    def taken(self) -> int:
        """Output tokens seen so far."""
        return self._taken

    def take(self) -> str:
        """The text since the last time; the rest, held back until then, once the call has ended."""
        if self._ended:
            return ""
        call = self.call
        text = self._take_echo(self._echo) if self._echo is not None and self._prompt_done else ""
        if len(call.token_ids) > self._taken:
            new = call.token_ids[self._taken :]
            if self._plain:
                text += self._text.feed(new)
                self._taken = self._text.num_tokens
            else:
                text += self._take_tokens(new)
        if call.finished is not None:
            if not self._shown.without_output:
                text += self._text.flush()
            self._reason = call.finished.reason
        if self._text.stop_string is not None:
            self._reason = FinishReason.STOP
        self._ended = self._reason is not None
        if self.scored:
            self._shown_characters += len(text)
        return text

    def take_scores(self) -> list[Score]:
        """The tokens, with log-probabilities, whose text has begun to come out; of none if they weren't asked for."""
        waiting, scores = self._waiting, []
        cut = self._text.stop_string is not None
        while waiting and (waiting[0].offset < self._shown_characters or (self._ended and not cut)):
            scores.append(waiting.popleft())
        return scores

    def result(self) -> Result | None:
        """None while the output goes on. Raises the error that ended it, if one did. Take the text first."""
        if not self._ended:
            return None
        if self._text.stop_string is None:
            self.check()
        if self._reason is None or self._reason is FinishReason.CANCELLED:
            raise CancelledRequestError("the request was cancelled")
        call = self.call
        cached = call.started.cached_tokens if call.started is not None else 0
        # A stop string may have cut off some that were right.
        accepted = min(call.accepted_tokens, self._taken)
        usage = Usage(len(call.request.prompt_token_ids), cached, self._taken, accepted, call.rejected_tokens)
        if self._shown.without_output:
            return Result(FinishReason.LENGTH, Usage(usage.prompt_tokens, cached, 0))
        prompt_logprobs = self._prompt_logprobs() if self._shown.prompt_logprobs else None
        return Result(self._reason, usage, prompt_logprobs=prompt_logprobs)

    def check(self) -> None:
        """Raises the error that the call has ended with, if it did."""
        finished = self.call.finished
        if finished is not None and finished.error is not None:
            raise self._named(finished.error)

    @property
    def _prompt_done(self) -> bool:
        finished = self.call.finished
        return bool(self.call.token_ids) or (finished is not None and finished.reason in _GOOD_ENDS)

    def _take_tokens(self, token_ids: list[int]) -> str:
        if self._shown.without_output:
            self._taken += len(token_ids)
            return ""
        return self._take_scored(token_ids) if self.scored else self._take_to_stop_token(token_ids)

    def _take_to_stop_token(self, token_ids: list[int]) -> str:
        # A stop token is the last one, unless a stop string came before.
        stopped = token_ids[-1] in self._stop_token_ids
        text = self._text.feed(token_ids[:-1] if stopped else token_ids)
        self._taken = self._text.num_tokens + (stopped and self._text.stop_string is None)
        return text

    def _take_scored(self, token_ids: list[int]) -> str:
        texts = []
        for token_id in token_ids:
            if self._text.stop_string is not None:
                break
            logprobs = self.call.logprobs[self._taken]
            self._taken += 1
            if token_id not in self._shown.end_token_ids:
                offset = self._echo_length + self._text.num_characters
                self._waiting.append(Score(token_id, offset, logprobs))
            if token_id not in self._stop_token_ids:
                texts.append(self._text.feed((token_id,)))
        return "".join(texts)

    def _take_echo(self, echo: Echo) -> str:
        self._echo = None
        if self.scored:
            prompt = self.call.request.prompt_token_ids
            tokens = zip(prompt, echo.offsets, self._prompt_logprobs(), strict=True)
            self._waiting.extend(Score(*token) for token in tokens)
        return echo.text

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        by_position = self.call.prompt_logprobs
        count = len(self.call.request.prompt_token_ids)
        if any(position not in by_position for position in range(1, count)):
            raise InternalError("a peer sent no log-probabilities of some of the prompt's tokens")
        return (None, *(by_position[position] for position in range(1, count)))

    def _named(self, error: QuireError) -> QuireError:
        # Whoever compiles a constraint calls it by its kind; the client is told which of its own fields it was.
        if error.field.partition(".")[0] != "constraint":
            return error
        name = self._shown.constraint_field
        return error_of(error.code, error.message.replace(error.field, name, 1), name)

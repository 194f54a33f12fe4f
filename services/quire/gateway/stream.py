"""A call's tokens as text: what the core makes of each step, and how an output ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire.gateway.call import Call
from quire.service.errors import CancelledRequestError, QuireError, error_of
from quire.service.request import FinishReason
from quire.service.text import Detokenizer, OutputText


@dataclass(frozen=True, slots=True)
class Usage:
    """In tokens. `completion_tokens` counts all up to the end, an end token and those of a stop string included."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """How an output ended; `finish_reason` is STOP or LENGTH (everything else is raised as an error)."""

    finish_reason: FinishReason
    usage: Usage


def total_usage(results: Sequence[Result]) -> Usage:
    """The usage of several outputs together."""
    usages = [result.usage for result in results]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
    )


class TextStream:
    """Reads one call. `take` and `result` never wait: call them when the call has changed."""

    def __init__(self, call: Call, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.call = call
        self._text = OutputText(detokenizer, stop)
        self._ended = False
        self._reason: FinishReason | None = None

    @property
    def taken(self) -> int:
        """Output tokens seen so far."""
        return self._text.num_tokens

    def take(self) -> str:
        """The text since the last time; the rest, held back until then, once the call has ended."""
        if self._ended:
            return ""
        call = self.call
        text = self._text.feed(call.token_ids[self.taken :]) if len(call.token_ids) > self.taken else ""
        if call.finished is not None:
            text += self._text.flush()
            self._reason = call.finished.reason
        if self._text.stop_string is not None:
            self._reason = FinishReason.STOP
        self._ended = self._reason is not None
        return text

    def result(self) -> Result | None:
        """None while the output goes on. Raises the error that ended it, if one did. Take the text first."""
        if not self._ended:
            return None
        finished = self.call.finished
        if self._reason is FinishReason.ERROR and finished is not None and finished.error is not None:
            raise self._named(finished.error)
        if self._reason is None or self._reason is FinishReason.CANCELLED:
            raise CancelledRequestError("the request was cancelled")
        cached = self.call.started.cached_tokens if self.call.started is not None else 0
        return Result(self._reason, Usage(len(self.call.request.prompt_token_ids), cached, self.taken))

    def _named(self, error: QuireError) -> QuireError:
        # Whoever compiles a constraint may call it just that; the client is told which of its fields it was.
        constraint = self.call.request.constraint
        if constraint is not None and error.field.partition(".")[0] == "constraint":
            return error_of(error.code, error.message, f"constraint.{constraint.kind.value}")
        return error

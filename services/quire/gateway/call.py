"""One request in flight, between the router's frames and the reader of its text."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.service.errors import InternalError, QuireError
from quire.service.request import Finished, FinishReason, Request, Started, TokenLogprobs
from quire.service.wire import finished_from_proto, logprobs_from_proto
from quire.v1 import session_pb2

if TYPE_CHECKING:
    from quire.gateway.router_link import RouterLink


@dataclass(slots=True, eq=False)
class Call:
    """One request in flight. The reader waits on `wake` and looks at the rest; only the sessions write it.

    `token_ids` are all output tokens so far, at most max_tokens: that bounds what a slow reader can pile up.
    `logprobs` has one for each of them if the request asked for any; `prompt_logprobs` those of prompt tokens by
    position.
    """

    request: Request
    wake: asyncio.Event
    token_ids: list[int] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    # Of those that engines drafted.
    accepted_tokens: int = 0
    rejected_tokens: int = 0
    # Which router has it, under which key; how many it lost in a row without a token.
    link: RouterLink | None = None
    key: int = 0
    fruitless_moves: int = 0
    _scored: bool = field(init=False)

    def __post_init__(self) -> None:
        self._scored = self.request.logprobs is not None or self.request.prompt_logprobs is not None

    def feed(self, update: session_pb2.RequestUpdate) -> None:
        """What a step did for it. Called for every token, so it works on the message as it is."""
        if self._scored and not self._feed_logprobs(update):
            return
        if update.token_ids:
            self.token_ids.extend(update.token_ids)
            self.fruitless_moves = 0
        if update.HasField("drafts"):
            self.accepted_tokens += update.drafts.accepted
            self.rejected_tokens += update.drafts.rejected
        if self.started is None and update.HasField("started"):
            self.started = Started(update.started.cached_tokens, update.started.engine)
        if update.HasField("finished"):
            try:
                self.end(finished_from_proto(update.finished))
            except QuireError as error:
                self.end(Finished(FinishReason.ERROR, error))
        self.wake.set()

    def _feed_logprobs(self, update: session_pb2.RequestUpdate) -> bool:
        """False if the peer's don't fit, which ends the call."""
        try:
            if self.request.logprobs is not None:
                tokens, logprobs = len(update.token_ids), len(update.logprobs)
                if tokens != logprobs:
                    raise InternalError(f"a peer sent {tokens} tokens with {logprobs} log-probabilities")
                self.logprobs.extend(map(logprobs_from_proto, update.logprobs))
            if update.HasField("prompt_logprobs"):
                first = update.prompt_logprobs.first
                self.prompt_logprobs.update(enumerate(map(logprobs_from_proto, update.prompt_logprobs.tokens), first))
        except QuireError as error:
            self.fail(error)
            return False
        return True

    def end(self, finished: Finished) -> None:
        """The terminal event; only the first counts."""
        if self.finished is None:
            self.finished = finished
            self.wake.set()

    def fail(self, error: QuireError) -> None:
        """It ends with `error`."""
        self.end(Finished(FinishReason.ERROR, error))

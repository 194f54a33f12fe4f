"""What the gateway does, without HTTP or gRPC: a prompt and options become a Generation, a Generation becomes text.

Both servers (`http`, `grpc_api`) do the same three things: `prepare` what the client asked for, `open` an Output and
read it. Leaving the Output's `with` block early cancels what is still running, so a client that goes away frees its
pages within one step.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from quire.gateway.errors import ContextLengthError
from quire.gateway.model import Conversation, Prompt, ServedModel
from quire.gateway.options import Options
from quire.gateway.session import RouterSessions
from quire.gateway.stream import Result, TextStream
from quire.service.request import CacheKey, Request, SamplingParams, StopConditions, TraceContext
from quire.service.text import Detokenizer

_COMPLETION_MAX_TOKENS = 16


class Operation(Enum):
    """What is generated; the values are OpenTelemetry's for `gen_ai.operation.name`."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"


@dataclass(frozen=True, slots=True)
class Generation:
    """One output to generate: the request for the engine, and the stop strings that are matched here."""

    operation: Operation
    request: Request
    stop: tuple[str, ...] = ()


class Output:
    """The text of one or several generations while it comes: enter it, iterate over it, leave it.

    Iteration yields (index of the generation, new text) and, exactly once per generation, (index, Result). The error
    that ends one generation is raised and ends them all. `progress` is called with the number of new
    tokens whenever some have come.
    """

    def __init__(
        self,
        sessions: RouterSessions,
        model: ServedModel,
        generations: Sequence[Generation],
        progress: Callable[[int], None],
    ) -> None:
        self._sessions = sessions
        self._model = model
        self._generations = generations
        self._progress = progress
        self._wake = asyncio.Event()
        self._streams: list[TextStream] = []

    def __enter__(self) -> Output:
        for generation in self._generations:
            call = self._sessions.submit(generation.request, self._wake)
            detokenizer = Detokenizer(self._model.pieces, strip_leading=generation.operation is Operation.CHAT)
            self._streams.append(TextStream(call, detokenizer, generation.stop))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            self._sessions.cancel(stream.call)

    async def begun(self) -> None:
        """Returns when one generation was scheduled or has ended; raises the error if it ended with one.

        Before that a server has not promised the client anything: it can still answer with an error's status.
        """
        while not any(stream.call.started or stream.call.token_ids for stream in self._streams):
            for stream in self._streams:
                stream.take()
                if stream.result() is not None:
                    return
            await self._changed()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | Result]]:
        open_streams = dict(enumerate(self._streams))
        while True:
            for index, stream in list(open_streams.items()):
                taken = stream.taken
                text = stream.take()
                if stream.taken > taken:
                    self._progress(stream.taken - taken)
                if text:
                    yield index, text
                result = stream.result()
                if result is not None:
                    del open_streams[index]
                    self._sessions.cancel(stream.call)
                    yield index, result
            if not open_streams:
                return
            await self._changed()

    async def _changed(self) -> None:
        await self._wake.wait()
        self._wake.clear()


class Core:
    """One model behind some routers."""

    def __init__(self, model: ServedModel, sessions: RouterSessions) -> None:
        self.model = model
        self._sessions = sessions

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now, and not have to wait for a router."""
        return self._sessions.ready

    @property
    def router_states(self) -> dict[str, str]:
        """For each router's address "ready", or why it can't take a request now."""
        return self._sessions.states

    async def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        options: Options,
        *,
        trace: TraceContext,
        deadline_unix_ms: int | None = None,
    ) -> Generation:
        """Tokenizes `prompt` and fills in all defaults.

        Raises InvalidRequestError and ContextLengthError, whose field is `prompt`, `messages` or an option's name.
        """
        token_ids = await self.model.tokens_of(prompt)
        operation = Operation.CHAT if isinstance(prompt, Conversation) else Operation.TEXT_COMPLETION
        request = Request(
            request_id=request_id,
            model=self.model.name,
            prompt_token_ids=token_ids,
            sampling=SamplingParams(
                temperature=1.0 if options.temperature is None else options.temperature,
                top_p=1.0 if options.top_p is None else options.top_p,
                top_k=options.top_k or 0,
                seed=secrets.randbits(63) if options.seed is None else options.seed % 2**64,
            ),
            stop=StopConditions(max_tokens=self._max_tokens(operation, len(token_ids), options.max_tokens)),
            constraint=options.constraint,
            cache_key=CacheKey(salt=options.cache_salt),
            priority=options.priority,
            deadline_unix_ms=deadline_unix_ms,
            trace=trace,
        )
        return Generation(operation, request, options.stop)

    def open(self, generations: Sequence[Generation], progress: Callable[[int], None]) -> Output:
        """The output of `generations`, which are sent when it is entered."""
        return Output(self._sessions, self.model, generations, progress)

    def _max_tokens(self, operation: Operation, prompt_tokens: int, asked: int | None) -> int:
        context = self.model.max_model_len
        room = context - prompt_tokens
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and the model's context holds {context}, output included: "
                f"shorten the prompt by at least {1 - room} tokens",
                field="messages" if operation is Operation.CHAT else "prompt",
            )
        if asked is None:
            return room if operation is Operation.CHAT else min(_COMPLETION_MAX_TOKENS, room)
        if asked > room:
            raise ContextLengthError(
                f"max_tokens is {asked} and the prompt has {prompt_tokens} tokens, together more than the model's "
                f"context of {context}: set max_tokens to at most {room} or shorten the prompt",
                field="max_tokens",
            )
        return asked

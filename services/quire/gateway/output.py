"""What is generated for one prompt and choice, and its text while it comes.

`core` makes Generations and opens Outputs; both servers read them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import TracebackType

from quire.gateway.answer import AnswerParser
from quire.gateway.deltas import Delta, Scores
from quire.gateway.model import ServedModel
from quire.gateway.reasoning import Thinking
from quire.gateway.session import RouterSessions
from quire.gateway.stream import Result, Shown, TextStream
from quire.service.request import Request


class Operation(Enum):
    """What is generated; the values are OpenTelemetry's for `gen_ai.operation.name`."""

    CHAT = "chat"
    TEXT_COMPLETION = "text_completion"


@dataclass(frozen=True, slots=True)
class Generation:
    """One output to generate: the request for the engine, and what becomes of its text here.

    `choice` numbers the outputs of one prompt, from 0.
    """

    operation: Operation
    request: Request
    shown: Shown = field(default_factory=Shown)
    choice: int = 0
    thinking: Thinking = Thinking.NEVER
    tools: tuple[str, ...] = ()

    @property
    def parsed(self) -> bool:
        """Whether there may be more in its text than text."""
        return bool(self.tools) or self.thinking is not Thinking.NEVER


class Output:
    """The text of one or several generations while it comes: enter it, iterate over it, leave it.

    Iteration yields (index of the generation, Delta) and, exactly once per generation, (index, Result). The error
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
            detokenizer = self._model.detokenizer(strip_leading=generation.operation is Operation.CHAT)
            self._streams.append(TextStream(call, detokenizer, generation.shown))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for stream in self._streams:
            self._sessions.cancel(stream.call)

    async def begun(self) -> None:
        """Returns when one generation was scheduled or has ended; raises the error if one ended with an error.

        Before that a server has not promised the client anything: it can still answer with an error's status.
        """
        while True:
            for stream in self._streams:
                stream.check()
            if any(stream.call.started or stream.call.token_ids or stream.call.finished for stream in self._streams):
                return
            await self._changed()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta | Result]]:
        open_streams = dict(enumerate(self._streams))
        parsers = {index: self._parser(index) for index in open_streams}
        while True:
            for index, stream in list(open_streams.items()):
                taken = stream.taken
                text = stream.take()
                if stream.taken > taken:
                    self._progress(stream.taken - taken)
                if stream.scored and (scores := stream.take_scores()):
                    yield index, Scores(tuple(scores))
                parser = parsers[index]
                if text:
                    if parser is None:
                        yield index, text
                    else:
                        for part in parser.feed(text):
                            yield index, part
                result = stream.result()
                if result is not None:
                    del open_streams[index]
                    self._sessions.cancel(stream.call)
                    if parser is not None:
                        for part in parser.flush():
                            yield index, part
                        result = replace(result, calls=parser.num_calls)
                    yield index, result
            if not open_streams:
                return
            await self._changed()

    def _parser(self, index: int) -> AnswerParser | None:
        generation = self._generations[index]
        if not generation.parsed:
            return None
        return AnswerParser(generation.thinking, self._model.tool_format, generation.tools)

    async def _changed(self) -> None:
        await self._wake.wait()
        self._wake.clear()

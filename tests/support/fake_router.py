"""A router that speaks the real SessionService on a real socket and generates what the test tells it to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import grpc

from quire.service.errors import QuireError
from quire.service.grpc_server import GrpcServer
from quire.service.request import (
    Finished,
    FinishReason,
    PromptLogprobs,
    Request,
    Started,
    TokenLogprobs,
    Update,
    VerifiedDrafts,
)
from quire.service.wire import request_from_proto, update_to_proto
from quire.v1 import session_pb2, session_pb2_grpc

SERVICE = "quire.v1.SessionService"


class Submission:
    """One request that reached the router, and the means to answer it."""

    def __init__(self, key: int, request: Request, frames: asyncio.Queue[session_pb2.SessionResponse]) -> None:
        self.key = key
        self.request = request
        self.cancelled = asyncio.Event()
        self.ended = False
        self._frames = frames

    def send(
        self,
        tokens: Sequence[int] = (),
        *,
        cached: int | None = None,
        finish: FinishReason | None = None,
        error: QuireError | None = None,
        logprobs: Sequence[TokenLogprobs] | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
        drafts: VerifiedDrafts | None = None,
    ) -> None:
        """One update in a frame of its own; log-probabilities are made up if they were asked for and not given."""
        started = None if cached is None else Started(cached, "engine-0")
        reason = FinishReason.ERROR if error else finish
        finished = None if reason is None else Finished(reason, error)
        self.ended = finished is not None
        if logprobs is None:
            count = self.request.logprobs
            logprobs = [] if count is None else [made_up_logprobs(token, count) for token in tokens]
        update = update_to_proto(
            Update(self.key, tuple(tokens), started, finished, tuple(logprobs), prompt_logprobs, drafts)
        )
        self._frames.put_nowait(session_pb2.SessionResponse(step=session_pb2.StepFrame(updates=[update])))


def made_up_logprobs(token_id: int, count: int) -> TokenLogprobs:
    """The token is the likeliest, those with the next ids follow; the last of several can't come at all."""
    top = [(token_id + place, -0.5 - place) for place in range(count)]
    if count > 1:
        top[-1] = (top[-1][0], -math.inf)
    return TokenLogprobs(-0.5, 1, tuple(top))


Answer = Callable[[Submission], Awaitable[None]]


class FakeRouter(session_pb2_grpc.SessionServiceServicer):
    """`answer` runs as a task for each submission; without one a test takes submissions from `submitted` itself."""

    def __init__(self, address: str, model: str, answer: Answer | None = None) -> None:
        self.address = address
        self.submitted: asyncio.Queue[Submission] = asyncio.Queue()
        self.connected = asyncio.Event()
        self.peers: list[str] = []
        # TLS, if it listens on TCP.
        self.credentials: grpc.ServerCredentials | None = None
        self._model = model
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()
        self._sessions: list[asyncio.Queue[session_pb2.SessionResponse]] = []
        self._server: GrpcServer | None = None

    async def start(self, *, serving: bool = True) -> FakeRouter:
        """Listens; starting it again after `kill` is a restart on the same address."""
        self._server = GrpcServer(self.address, credentials=self.credentials)
        self._server.add(SERVICE, session_pb2_grpc.add_SessionServiceServicer_to_server, self)
        self.address = await self._server.start()
        await self._server.set_serving(serving)
        return self

    async def set_serving(self, serving: bool) -> None:
        """What its health says."""
        assert self._server is not None
        await self._server.set_serving(serving)

    async def kill(self) -> None:
        """Breaks every session at once."""
        for task in list(self._tasks):
            task.cancel()
        if self._server is not None:
            await self._server.server.stop(0)
            self._server = None
        self.connected.clear()

    def drain(self) -> None:
        """Tells every peer that it wants no new requests."""
        for frames in self._sessions:
            frames.put_nowait(session_pb2.SessionResponse(draining=session_pb2.Draining()))

    def send_raw(self, response: session_pb2.SessionResponse) -> None:
        """Any frame, for tests of what a peer must not send."""
        for frames in self._sessions:
            frames.put_nowait(response)

    async def next(self) -> Submission:
        """The next submission, within a deadline."""
        return await asyncio.wait_for(self.submitted.get(), 10)

    async def Session(  # noqa: N802
        self,
        request_iterator: AsyncIterator[session_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[session_pb2.SessionRequest, session_pb2.SessionResponse],
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        frames: asyncio.Queue[session_pb2.SessionResponse] = asyncio.Queue()
        reading = asyncio.create_task(self._read(request_iterator, frames))
        self._sessions.append(frames)
        try:
            while True:
                yield await frames.get()
        finally:
            reading.cancel()
            self._sessions.remove(frames)

    async def _read(
        self,
        requests: AsyncIterator[session_pb2.SessionRequest],
        frames: asyncio.Queue[session_pb2.SessionResponse],
    ) -> None:
        submissions: dict[int, Submission] = {}
        async for request in requests:
            match request.WhichOneof("frame"):
                case "hello":
                    self.peers.append(request.hello.peer)
                    welcome = session_pb2.Welcome(server="fake", model=self._model)
                    frames.put_nowait(session_pb2.SessionResponse(welcome=welcome))
                    self.connected.set()
                case "submit":
                    key = request.submit.key
                    assert key not in submissions, "a key was used twice in a session"
                    submission = Submission(key, request_from_proto(request.submit.request), frames)
                    submissions[key] = submission
                    self.submitted.put_nowait(submission)
                    if self._answer is not None:
                        task = asyncio.create_task(self._answer(submission))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                case "cancel":
                    submission = submissions[request.cancel.key]
                    submission.cancelled.set()
                    if not submission.ended:
                        submission.send(finish=FinishReason.CANCELLED)


def scripted(token_ids: Sequence[int], *, cached: int = 0, per_step: int = 1) -> Answer:
    """Generates `token_ids`, `per_step` at a time, as far as max_tokens allows; goes on after those it is sent."""

    async def answer(submission: Submission) -> None:
        request = submission.request
        tokens = list(token_ids)[: request.stop.max_tokens]
        reason = FinishReason.STOP if len(tokens) == len(token_ids) else FinishReason.LENGTH
        submission.send(cached=cached)
        if (count := request.prompt_logprobs) is not None:
            places = tuple(made_up_logprobs(token, count) for token in request.prompt_token_ids[1:])
            middle = len(places) // 2
            submission.send(prompt_logprobs=PromptLogprobs(1, places[:middle]))
            submission.send(prompt_logprobs=PromptLogprobs(1 + middle, places[middle:]))
        for start in range(len(request.output_token_ids), len(tokens), per_step):
            await asyncio.sleep(0)
            if submission.cancelled.is_set():
                return
            step = tokens[start : start + per_step]
            submission.send(step, finish=reason if start + per_step >= len(tokens) else None)

    return answer

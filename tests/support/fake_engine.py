"""An engine without a model: it speaks the real contract on a real socket and does what the test tells it to.

Its tokens are a function of prompt and position alone, so the output of a request shows whether it was continued at
the right place, wherever it ran.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from quire.service.errors import CancelledRequestError, QuireError, UnavailableError
from quire.service.grpc_server import GrpcServer, abort
from quire.service.pages import PAGE_SIZE, prefix_hashes
from quire.service.request import CacheKey, Finished, FinishReason, Request, Started, Update, VerifiedDrafts
from quire.service.wire import request_from_proto, update_to_proto
from quire.v1 import engine_pb2, engine_pb2_grpc, session_pb2, session_pb2_grpc

MODEL = "fake-model"
DEADLINE = 10.0

_Context = grpc.aio.ServicerContext[Any, Any]


def token_at(prompt: Sequence[int], position: int) -> int:
    """The output token at `position` for `prompt`."""
    return zlib.crc32(repr((tuple(prompt), position)).encode()) % 50_000


def output_of(prompt: Sequence[int], count: int) -> list[int]:
    """The first `count` output tokens for `prompt`."""
    return [token_at(prompt, position) for position in range(count)]


@dataclass(eq=False)
class _Sequence:
    session: _Session
    key: int
    request: Request
    position: int
    started: bool = False


@dataclass(eq=False)
class _Session:
    frames: asyncio.Queue[session_pb2.SessionResponse] = field(default_factory=asyncio.Queue)
    sequences: dict[int, _Sequence] = field(default_factory=dict)

    def send(self, updates: Sequence[Update]) -> None:
        step = session_pb2.StepFrame(updates=[update_to_proto(update) for update in updates])
        self.frames.put_nowait(session_pb2.SessionResponse(step=step))


class FakeEngine(session_pb2_grpc.SessionServiceServicer, engine_pb2_grpc.EngineServiceServicer):
    """Switches, all of which a test may turn at any time:

    - `hold_at(n)`: requests stop at n output tokens until `hold_at(None)`; 0 holds them before they start.
    - `set_load(…)`: what it reports. `store` and `evict`: what it caches. `lose_event`: the next change is not told.
    - `fail_next(error)`: how it answers the next submission. `drain`, `kill`, `start` again: a new epoch.
    """

    def __init__(self, address: str, name: str, *, model: str = MODEL) -> None:
        self.address = address
        self.name = name
        self.model = model
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.epoch = 0
        self.page_size = PAGE_SIZE
        self.max_num_seqs = 0
        self.subscriptions = 0
        self.sessions_opened = 0
        # Whether prompts are cached as they start, as a real engine does.
        self.caches_prompts = True
        # TLS, if it listens on TCP.
        self.credentials: grpc.ServerCredentials | None = None
        # It hears no cancellation.
        self.deaf = False
        self.changed = asyncio.Event()
        self._sequence = 0
        self._pages: dict[bytes, None] = {}
        self._load = engine_pb2.WatchLoadResponse(phase=engine_pb2.ENGINE_PHASE_READY)
        self._sessions: list[_Session] = []
        self._cache_watches: list[asyncio.Queue[engine_pb2.WatchCacheResponse | None]] = []
        self._load_watches: list[asyncio.Queue[engine_pb2.WatchLoadResponse]] = []
        self._limit: int | None = None
        self._failures: list[QuireError] = []
        self._work = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._server: GrpcServer | None = None

    async def start(self) -> FakeEngine:
        """Listens, under a new epoch and with an empty cache."""
        self.epoch += 1
        self._sequence = 0
        self._pages.clear()
        self._server = GrpcServer(self.address, credentials=self.credentials)
        self._server.add("quire.v1.SessionService", session_pb2_grpc.add_SessionServiceServicer_to_server, self)
        self._server.add("quire.v1.EngineService", engine_pb2_grpc.add_EngineServiceServicer_to_server, self)
        self.address = await self._server.start()
        self._stepping = asyncio.create_task(self._step_forever())
        return self

    async def kill(self) -> None:
        """Breaks every call at once."""
        if self._server is None or self._stepping is None:
            return
        self._stepping.cancel()
        server, self._server = self._server, None
        await server.server.stop(0)

    def drain(self) -> None:
        """Tells every peer that it wants no new requests."""
        for session in self._sessions:
            session.frames.put_nowait(session_pb2.SessionResponse(draining=session_pb2.Draining()))

    def hold_at(self, limit: int | None) -> None:
        """Requests stop at `limit` output tokens; None lets them run to their end."""
        self._limit = limit
        self._work.set()

    def fail_next(self, *errors: QuireError) -> None:
        """The next submissions end with these errors."""
        self._failures.extend(errors)

    def forget_failures(self) -> None:
        """What `fail_next` asked for and has not come yet."""
        self._failures.clear()

    def fail_all(self, error: QuireError) -> None:
        """Every request ends with `error` now."""
        for session in self._sessions:
            finished = Finished(FinishReason.ERROR, error)
            session.send([Update(key, finished=finished) for key in session.sequences])
            session.sequences.clear()

    def end_sessions(self) -> None:
        """Every session ends, the watches go on."""
        for session in self._sessions:
            session.frames.put_nowait(session_pb2.SessionResponse())

    def send_raw(self, response: session_pb2.SessionResponse) -> None:
        """Any frame, to every peer."""
        for session in self._sessions:
            session.frames.put_nowait(response)

    def set_load(self, **fields: Any) -> None:
        """Changes these fields of the load report and reports."""
        self._load.MergeFrom(engine_pb2.WatchLoadResponse(**fields))
        for name, value in fields.items():
            setattr(self._load, name, value)
        for watch in self._load_watches:
            watch.put_nowait(self._report())

    def store(self, prompt: Sequence[int], *, key: CacheKey | None = None) -> None:
        """Caches the full pages of `prompt`."""
        hashes = prefix_hashes(key or CacheKey(), prompt)
        self._publish([page for page in hashes if page not in self._pages], [])

    def evict(self, pages: Iterable[bytes]) -> None:
        """Drops pages from the cache."""
        self._publish([], [page for page in pages if page in self._pages])

    def lose_event(self, prompt: Sequence[int]) -> None:
        """Caches a prompt without telling anyone: the subscribers miss an event."""
        watches, self._cache_watches = self._cache_watches, []
        self.store(prompt)
        self._cache_watches = watches

    def end_cache_watches(self) -> None:
        """Ends every watch of the cache, as an engine does with a subscriber that falls behind."""
        for watch in self._cache_watches:
            watch.put_nowait(None)

    def restart_cache(self) -> None:
        """A new epoch with an empty cache, of which nobody is told."""
        self.epoch += 1
        self._sequence = 0
        self._pages.clear()

    def send_cache_event(self, event: engine_pb2.WatchCacheResponse) -> None:
        """Any cache event, to every subscriber."""
        for watch in self._cache_watches:
            watch.put_nowait(event)

    async def until_submitted(self, count: int = 1) -> Request:
        """The last request, once `count` have come since the start."""
        async with asyncio.timeout(DEADLINE):
            while len(self.submitted) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.submitted[-1]

    async def until(self, condition: Any) -> None:
        """Returns when `condition()` holds; it is asked after each thing that happens to the engine."""
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    @property
    def sessions_open(self) -> int:
        return len(self._sessions)

    @property
    def in_flight(self) -> int:
        return sum(len(session.sequences) for session in self._sessions)

    # SessionService

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[session_pb2.SessionRequest], context: _Context
    ) -> AsyncIterator[session_pb2.SessionResponse]:
        if self._load.phase != engine_pb2.ENGINE_PHASE_READY:
            await abort(context, UnavailableError("the engine is not ready: try another"))
        session = _Session()
        self._sessions.append(session)
        self.sessions_opened += 1
        reading = asyncio.create_task(self._read(request_iterator, session))
        try:
            yield session_pb2.SessionResponse(welcome=session_pb2.Welcome(server=self.name, model=self.model))
            while (frame := await session.frames.get()).WhichOneof("frame"):
                yield frame
        finally:
            reading.cancel()
            self._sessions.remove(session)
            self.changed.set()

    async def _read(self, requests: AsyncIterator[session_pb2.SessionRequest], session: _Session) -> None:
        async for message in requests:
            match message.WhichOneof("frame"):
                case "submit":
                    self._submit(session, message.submit.key, request_from_proto(message.submit.request))
                case "cancel":
                    self._cancel(session, message.cancel.key)
            self.changed.set()

    def _submit(self, session: _Session, key: int, request: Request) -> None:
        assert key not in session.sequences, "a key was used twice"
        self.submitted.append(request)
        if self._failures:
            error = self._failures.pop(0)
            reason = FinishReason.CANCELLED if isinstance(error, CancelledRequestError) else FinishReason.ERROR
            session.send([Update(key, finished=Finished(reason, None if reason is FinishReason.CANCELLED else error))])
            return
        session.sequences[key] = _Sequence(session, key, request, len(request.output_token_ids))
        self._work.set()

    def _cancel(self, session: _Session, key: int) -> None:
        sequence = None if self.deaf else session.sequences.pop(key, None)
        if sequence is not None:
            self.cancelled.append(sequence.request.request_id)
            session.send([Update(key, finished=Finished(FinishReason.CANCELLED))])

    async def _step_forever(self) -> None:
        while True:
            if not self._step():
                self._work.clear()
                await self._work.wait()
            await asyncio.sleep(0)

    def _step(self) -> bool:
        """One token for each sequence that may have one; one frame for each session."""
        stepped = False
        for session in self._sessions:
            sequences = [s for s in session.sequences.values() if self._limit is None or s.position < self._limit]
            if sequences:
                session.send([self._advance(sequence) for sequence in sequences])
                stepped = True
        if stepped:
            self.changed.set()
        return stepped

    def _advance(self, sequence: _Sequence) -> Update:
        request = sequence.request
        started = finished = None
        if not sequence.started:
            sequence.started = True
            started = Started(self._cached_tokens(request), self.name)
            if self.caches_prompts:
                self.store(request.prompt_token_ids, key=request.cache_key)
        token = token_at(request.prompt_token_ids, sequence.position)
        sequence.position += 1
        if token in request.stop.stop_token_ids:
            finished = Finished(FinishReason.STOP)
        elif sequence.position >= request.stop.max_tokens:
            finished = Finished(FinishReason.LENGTH)
        if finished is not None:
            del sequence.session.sequences[sequence.key]
        # As if one draft a step was in vain, so that tests see each counted once.
        return Update(sequence.key, (token,), started, finished, drafts=VerifiedDrafts(0, 1))

    def _cached_tokens(self, request: Request) -> int:
        pages = 0
        for page in prefix_hashes(request.cache_key, request.prompt_token_ids):
            if page not in self._pages:
                break
            pages += 1
        return min(pages, (len(request.prompt_token_ids) - 1) // PAGE_SIZE) * PAGE_SIZE

    # EngineService

    async def WatchCache(  # noqa: N802
        self, request: engine_pb2.WatchCacheRequest, context: _Context
    ) -> AsyncIterator[engine_pb2.WatchCacheResponse]:
        watch: asyncio.Queue[engine_pb2.WatchCacheResponse | None] = asyncio.Queue()
        snapshot = engine_pb2.CacheSnapshot(stored=b"".join(self._pages))
        first = engine_pb2.WatchCacheResponse(epoch=self.epoch, sequence=self._sequence, snapshot=snapshot)
        self._cache_watches.append(watch)
        self.subscriptions += 1
        self.changed.set()
        try:
            yield first
            while (event := await watch.get()) is not None:
                yield event
            await abort(context, UnavailableError("the subscriber fell behind: subscribe again for a snapshot"))
        finally:
            self._cache_watches.remove(watch)

    def _publish(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        if not stored and not removed:
            return
        for page in removed:
            del self._pages[page]
        self._pages.update(dict.fromkeys(stored))
        self._sequence += 1
        delta = engine_pb2.CacheDelta(stored=b"".join(stored), removed=b"".join(removed))
        self.send_cache_event(engine_pb2.WatchCacheResponse(epoch=self.epoch, sequence=self._sequence, delta=delta))

    async def WatchLoad(  # noqa: N802
        self, request: engine_pb2.WatchLoadRequest, context: _Context
    ) -> AsyncIterator[engine_pb2.WatchLoadResponse]:
        assert request.HasField("interval_ms")
        watch: asyncio.Queue[engine_pb2.WatchLoadResponse] = asyncio.Queue()
        self._load_watches.append(watch)
        try:
            yield self._report()
            while True:
                yield await watch.get()
        finally:
            self._load_watches.remove(watch)

    async def GetStatus(  # noqa: N802
        self, request: engine_pb2.GetStatusRequest, context: _Context
    ) -> engine_pb2.GetStatusResponse:
        return engine_pb2.GetStatusResponse(
            engine=self.name, phase=self._load.phase, epoch=self.epoch, model=self.model, page_size=self.page_size,
            max_num_seqs=self.max_num_seqs,
        )  # fmt: skip

    async def Drain(  # noqa: N802
        self, request: engine_pb2.DrainRequest, context: _Context
    ) -> engine_pb2.DrainResponse:
        self.drain()
        return engine_pb2.DrainResponse()

    def _report(self) -> engine_pb2.WatchLoadResponse:
        report = engine_pb2.WatchLoadResponse()
        report.CopyFrom(self._load)
        return report

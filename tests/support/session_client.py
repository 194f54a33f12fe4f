"""A peer that opens a SessionService stream and asks for tokens, as a gateway or a router does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from quire.service.grpc_server import channel
from quire.service.request import Finished, Request, Started
from quire.service.wire import request_to_proto, update_from_proto
from quire.v1 import request_pb2, session_pb2, session_pb2_grpc

DEADLINE = 60.0


@dataclass
class Stream:
    """One request's events so far."""

    key: int
    token_ids: list[int] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None
    starts: int = 0
    terminal_events: int = 0
    rejected_drafts: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until_tokens(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            while len(self.token_ids) < count and self.finished is None:
                self.changed.clear()
                await self.changed.wait()

    async def result(self) -> Finished:
        async with asyncio.timeout(DEADLINE):
            while self.finished is None:
                self.changed.clear()
                await self.changed.wait()
        return self.finished


class SessionClient:
    """`async with SessionClient(address) as session`: entered once the server has said welcome."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._outgoing: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._keys = itertools.count(1)
        self.streams: dict[int, Stream] = {}
        self.welcome: session_pb2.Welcome | None = None
        self.draining = asyncio.Event()
        self.ended = asyncio.Event()
        self.frames = 0
        self._welcomed = asyncio.Event()

    async def __aenter__(self) -> SessionClient:
        self._channel = channel(self._address)
        self._outgoing.put_nowait(session_pb2.SessionRequest(hello=session_pb2.Hello(peer="test")))
        self._task = asyncio.create_task(self._read())
        await asyncio.wait_for(self._welcomed.wait(), DEADLINE)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    def submit(self, request: Request | request_pb2.Request, key: int | None = None) -> Stream:
        message = request_to_proto(request) if isinstance(request, Request) else request
        stream = Stream(next(self._keys) if key is None else key)
        self.streams.setdefault(stream.key, stream)
        submit = session_pb2.Submit(key=stream.key, request=message)
        self._outgoing.put_nowait(session_pb2.SessionRequest(submit=submit))
        return self.streams[stream.key]

    def cancel(self, stream: Stream) -> None:
        self._outgoing.put_nowait(session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=stream.key)))

    async def _outgoing_frames(self) -> AsyncIterator[session_pb2.SessionRequest]:
        while True:
            yield await self._outgoing.get()

    async def _read(self) -> None:
        stub = session_pb2_grpc.SessionServiceStub(self._channel)
        try:
            async for frame in stub.Session(self._outgoing_frames(), wait_for_ready=True):
                match frame.WhichOneof("frame"):
                    case "welcome":
                        self.welcome = frame.welcome
                        self._welcomed.set()
                    case "draining":
                        self.draining.set()
                    case "step":
                        self.frames += 1
                        for update in frame.step.updates:
                            self._take(update)
        finally:
            self.ended.set()

    def _take(self, message: session_pb2.RequestUpdate) -> None:
        update = update_from_proto(message)
        stream = self.streams[update.key]
        stream.token_ids.extend(update.token_ids)
        if update.drafts is not None:
            stream.rejected_drafts += update.drafts.rejected
        if update.started is not None:
            stream.starts += 1
            stream.started = stream.started or update.started
        if update.finished is not None:
            stream.terminal_events += 1
            stream.finished = update.finished
        stream.changed.set()

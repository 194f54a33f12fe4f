"""The gateway's side of the multiplexed SessionService: one long-lived stream per router, all requests on them.

The core submits a request here and gets a `Call`, which the router's frames fill with tokens. When a router goes
away, what it left unfinished is submitted to another (or to the same one when it is back) with the tokens so far, and
the reader of the call sees nothing of it. Every call ends exactly once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.service.errors import QuireError, UnavailableError
from quire.service.grpc_server import channel
from quire.service.request import Finished, FinishReason, Request, Started
from quire.service.wire import finished_from_proto, request_to_proto
from quire.v1 import session_pb2, session_pb2_grpc

SERVICE = session_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name

# Seconds between attempts to open a stream that a router refuses; a router that isn't there at all is the channel's
# affair, which has its own backoff.
_FIRST_RETRY, _LAST_RETRY = 0.1, 2.0

# A request that loses router after router without a token in between may be the reason for it.
_MAX_FRUITLESS_MOVES = 3

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Call:
    """One request in flight. The reader waits on `wake` and looks at the rest; only the sessions write it.

    `token_ids` are all output tokens so far, at most max_tokens: that bounds what a slow reader can pile up.
    """

    request: Request
    wake: asyncio.Event
    token_ids: list[int] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None
    _link: _RouterLink | None = None
    _key: int = 0
    _fruitless_moves: int = 0
    _timer: asyncio.TimerHandle | None = None

    def _feed(self, update: session_pb2.RequestUpdate) -> None:
        if update.token_ids:
            self.token_ids.extend(update.token_ids)
            self._fruitless_moves = 0
        if self.started is None and update.HasField("started"):
            self.started = Started(update.started.cached_tokens, update.started.engine)
        if update.HasField("finished"):
            try:
                self._end(finished_from_proto(update.finished))
            except QuireError as error:
                self._end(Finished(FinishReason.ERROR, error))
        self.wake.set()

    def _end(self, finished: Finished) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.finished is None:
            self.finished = finished
            self.wake.set()

    def _fail(self, error: QuireError) -> None:
        self._end(Finished(FinishReason.ERROR, error))


class RouterSessions:
    """The sessions to all routers: picks the one with the fewest requests in flight, and moves what a lost one held.

    `model` is the name that the routers must serve. `end_token_ids` are the model's own end tokens. `changed` is
    called whenever `states` may have.
    """

    def __init__(
        self,
        routers: Sequence[str],
        *,
        peer: str,
        model: str,
        end_token_ids: Sequence[int],
        router_timeout: float,
        changed: Callable[[], None],
    ) -> None:
        self._links = [_RouterLink(address, peer, model, self._link_changed, self._lost) for address in routers]
        self._end_token_ids = frozenset(end_token_ids)
        self._router_timeout = router_timeout
        self._changed = changed
        self._waiting: dict[Call, None] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    def start(self) -> None:
        """Connects to every router and keeps connected, until `close`."""
        self._tasks = [asyncio.create_task(link.run(), name=f"router {link.address}") for link in self._links]

    async def failed(self) -> None:
        """Raises what made the care of a router fail: a bug, for routers may come and go."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def close(self) -> None:
        """Ends what is still in flight with UNAVAILABLE and hangs up."""
        self.end_all(UnavailableError("the gateway is shutting down: send the request to another one"))
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether a router can take a request now."""
        return any(link.available for link in self._links)

    @property
    def states(self) -> dict[str, str]:
        """For each router's address "ready", or why it can't take a request now."""
        return {link.address: "ready" if link.available else link.reason for link in self._links}

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + sum(link.in_flight for link in self._links)

    def submit(self, request: Request, wake: asyncio.Event) -> Call:
        """Sends `request` to a router, as soon as one is there; `wake` is set whenever the call has changed."""
        call = Call(request, wake)
        if self._closed:
            call._fail(UnavailableError("the gateway is shutting down: send the request to another one"))
        else:
            self._dispatch(call)
        return call

    def cancel(self, call: Call) -> None:
        """Nobody reads `call` any more: its router frees what it holds. Does nothing to a call that has ended."""
        if call.finished is not None:
            return
        self._waiting.pop(call, None)
        call._end(Finished(FinishReason.CANCELLED))
        if call._link is not None:
            call._link.cancel(call)

    def end_all(self, error: QuireError) -> None:
        """Ends every call in flight with `error`."""
        for call in [*self._waiting, *itertools.chain.from_iterable(link.calls for link in self._links)]:
            if call.finished is None:
                self._waiting.pop(call, None)
                call._fail(error)
                if call._link is not None:
                    call._link.cancel(call)

    def _dispatch(self, call: Call) -> None:
        available = [link for link in self._links if link.available]
        if available:
            min(available, key=lambda link: link.in_flight).submit(call)
            return
        self._waiting[call] = None
        call._timer = asyncio.get_running_loop().call_later(self._router_timeout, self._expire, call)

    def _expire(self, call: Call) -> None:
        self._waiting.pop(call, None)
        states = "; ".join(f"{address}: {state}" for address, state in self.states.items())
        call._fail(UnavailableError(f"no router took the request within {self._router_timeout:g} s ({states})"))

    def _link_changed(self) -> None:
        if self.ready:
            waiting, self._waiting = self._waiting, {}
            for call in waiting:
                if call._timer is not None:
                    call._timer.cancel()
                    call._timer = None
                self._dispatch(call)
        self._changed()

    def _lost(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call._link = None
            if call.finished is None:
                if finished := self._already_over(call):
                    call._end(finished)
                elif call._fruitless_moves == _MAX_FRUITLESS_MOVES:
                    call._fail(
                        UnavailableError(f"{_MAX_FRUITLESS_MOVES + 1} routers were lost while they held the request")
                    )
                else:
                    call._fruitless_moves += 1
                    self._dispatch(call)

    def _already_over(self, call: Call) -> Finished | None:
        # The last token came and the terminal event got lost with the router: there is nothing left to generate.
        if call.token_ids and call.token_ids[-1] in self._end_token_ids.union(call.request.stop.stop_token_ids):
            return Finished(FinishReason.STOP)
        if len(call.token_ids) >= call.request.stop.max_tokens:
            return Finished(FinishReason.LENGTH)
        return None


class _RouterLink:
    """The stream to one router and the watch of its health."""

    def __init__(
        self,
        address: str,
        peer: str,
        model: str,
        changed: Callable[[], None],
        lost: Callable[[Sequence[Call]], None],
    ) -> None:
        self.address = address
        self._peer = peer
        self._model = model
        self._changed = changed
        self._lost = lost
        # Keys are never used twice, not even on another stream: an update can't reach the wrong call.
        self._keys = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._outgoing: asyncio.Queue[session_pb2.SessionRequest] = asyncio.Queue()
        self._welcomed = False
        self._draining = False
        self._serving = False
        self._failure = "not connected yet"

    @property
    def available(self) -> bool:
        """Whether new requests may go there."""
        return self._welcomed and self._serving and not self._draining

    @property
    def reason(self) -> str:
        """Why it is not available."""
        if not self._welcomed:
            return self._failure
        if self._draining:
            return "draining"
        return "connected, but its health is not SERVING"

    @property
    def in_flight(self) -> int:
        """Requests whose terminal event has not come yet."""
        return len(self._calls)

    @property
    def calls(self) -> list[Call]:
        """The requests whose terminal event has not come yet."""
        return list(self._calls.values())

    def submit(self, call: Call) -> None:
        """Sends a call's request, with the tokens that it has already."""
        call._link, call._key = self, next(self._keys)
        self._calls[call._key] = call
        request = replace(call.request, output_token_ids=tuple(call.token_ids)) if call.token_ids else call.request
        submit = session_pb2.Submit(key=call._key, request=request_to_proto(request))
        self._outgoing.put_nowait(session_pb2.SessionRequest(submit=submit))

    def cancel(self, call: Call) -> None:
        """Takes a call back. It counts as in flight until its terminal event has come."""
        self._outgoing.put_nowait(session_pb2.SessionRequest(cancel=session_pb2.Cancel(key=call._key)))

    async def run(self) -> None:
        """Connects and reconnects until it is cancelled."""
        async with channel(self.address) as router, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_health(router))
            tasks.create_task(self._keep_session(session_pb2_grpc.SessionServiceStub(router)))

    async def _keep_session(self, stub: session_pb2_grpc.SessionServiceAsyncStub) -> None:
        delay = _FIRST_RETRY
        while True:
            try:
                await self._session(stub)
                self._failure = "it ended the session"
            except grpc.aio.AioRpcError as error:
                self._failure = f"{error.code().name}: {error.details()}"
            except UnavailableError as error:
                self._failure = error.message
            delay = _FIRST_RETRY if self._welcomed else min(delay * 2, _LAST_RETRY)
            logger.warning(
                "lost router: %s", self._failure, extra={"router": self.address, "in_flight": self.in_flight}
            )
            self._hang_up()
            await asyncio.sleep(delay)

    async def _session(self, stub: session_pb2_grpc.SessionServiceAsyncStub) -> None:
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(session_pb2.SessionRequest(hello=session_pb2.Hello(peer=self._peer)))
        stream = stub.Session(_drained(self._outgoing), wait_for_ready=True)
        try:
            async for response in stream:
                match response.WhichOneof("frame"):
                    case "step" if self._welcomed:
                        self._deliver(response.step)
                    case "welcome" if not self._welcomed:
                        self._welcome(response.welcome)
                    case "draining" if self._welcomed:
                        self._draining = True
                        logger.info("router drains", extra={"router": self.address})
                        self._changed()
                    case frame:
                        raise UnavailableError(f"it sent an unexpected frame: {frame}")
        finally:
            stream.cancel()

    def _welcome(self, welcome: session_pb2.Welcome) -> None:
        if welcome.model and welcome.model != self._model:
            raise UnavailableError(
                f"it serves the model {welcome.model!r} and this gateway {self._model!r}: "
                "start both with the same --model and --served-model-name"
            )
        self._welcomed = True
        logger.info("session with router", extra={"router": self.address, "server": welcome.server})
        self._changed()

    def _deliver(self, step: session_pb2.StepFrame) -> None:
        calls = self._calls
        for update in step.updates:
            call = calls.get(update.key)
            if call is None:
                logger.warning(
                    "router sent an update for no request", extra={"router": self.address, "key": update.key}
                )
                continue
            if update.HasField("finished"):
                del calls[update.key]
            if call.finished is None:
                call._feed(update)

    def _hang_up(self) -> None:
        self._welcomed = self._draining = False
        calls, self._calls = self._calls, {}
        self._changed()
        self._lost(list(calls.values()))

    async def _watch_health(self, router: grpc.aio.Channel) -> None:
        stub = health_pb2_grpc.HealthStub(router)
        while True:
            try:
                async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), wait_for_ready=True):
                    self._set_serving(answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.aio.AioRpcError as error:
                logger.debug("lost health of router: %s", error.details(), extra={"router": self.address})
            self._set_serving(False)
            await asyncio.sleep(_FIRST_RETRY)

    def _set_serving(self, serving: bool) -> None:
        if serving != self._serving:
            self._serving = serving
            self._changed()


async def _drained(
    queue: asyncio.Queue[session_pb2.SessionRequest],
) -> AsyncIterator[session_pb2.SessionRequest]:
    while True:
        yield await queue.get()

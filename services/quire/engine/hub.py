"""The server's picture of its core: whose request each key is, the pages it holds, how busy it is.

Knows neither gRPC nor processes: the server feeds it the core's messages and hands it subscribers. Runs on one event
loop.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from quire.engine.inspection import Inspection
from quire.engine.messages import Cancel, Inspect, Inspected, Load, Ready, Stepped, Submit, ToCore
from quire.service.errors import QuireError, UnavailableError
from quire.service.request import Finished, FinishReason, Request, Update


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Which page hashes came and went; a snapshot has `snapshot` set and all of them in `stored`."""

    sequence: int
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...] = ()
    snapshot: bool = False


class CacheFeed:
    """One subscriber's events, in order. One that does not keep up is told to subscribe again, not waited for."""

    LIMIT = 1024

    def __init__(self, first: CacheEvent) -> None:
        self._events: deque[CacheEvent] = deque([first])
        self._changed = asyncio.Event()
        self._changed.set()
        self.overrun = False

    def push(self, event: CacheEvent) -> None:
        """Adds an event; beyond the limit the feed is marked as overrun and takes no more."""
        if len(self._events) >= self.LIMIT:
            self.overrun = True
        else:
            self._events.append(event)
        self._changed.set()

    async def next(self) -> CacheEvent | None:
        """The next event; None once the feed is overrun."""
        while not self._events and not self.overrun:
            self._changed.clear()
            await self._changed.wait()
        return None if self.overrun else self._events.popleft()


@dataclass(slots=True)
class Client:
    """One session's side: its own keys, and where its share of each step goes."""

    deliver: Callable[[list[Update]], None]
    keys: dict[int, int] = field(default_factory=dict)  # the session's key → the core's


class Hub:
    """Requests by core key, and the feeds. `send` reaches the core. `cache_sequence` is the last cache event's."""

    def __init__(self, send: Callable[[ToCore], None], epoch: int) -> None:
        self.epoch = epoch
        self.ready: Ready | None = None
        self.load: Load | None = None
        self.load_changed = asyncio.Condition()
        self._send = send
        self._core_keys = itertools.count(1)
        self._owners: dict[int, tuple[Client, int]] = {}
        self._pages: dict[bytes, None] = {}
        self.cache_sequence = 0
        self._feeds: set[CacheFeed] = set()
        self._tickets = itertools.count(1)
        self._inspections: dict[int, asyncio.Future[Inspection]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._progressed_at = time.monotonic()

    @property
    def in_flight(self) -> int:
        """Requests that have not had their terminal event."""
        return len(self._owners)

    def progressed(self) -> None:
        """The core has said something, or has just been given something to do."""
        self._progressed_at = time.monotonic()

    def silent_seconds(self) -> float:
        """For how long the core has said nothing although it has work; 0 if it has none."""
        return time.monotonic() - self._progressed_at if self._core_has_work else 0.0

    def submit(self, client: Client, key: int, request: Request) -> None:
        """Hands a request to the core; its updates go to `client` under `key`."""
        if not self._core_has_work:
            self.progressed()
        core_key = next(self._core_keys)
        client.keys[key] = core_key
        self._owners[core_key] = (client, key)
        self._idle.clear()
        self._send(Submit(core_key, request))

    def cancel(self, client: Client, key: int) -> None:
        """Asks the core to end a request; its terminal event still comes."""
        core_key = client.keys.get(key)
        if core_key is not None:
            self._send(Cancel(core_key))

    def leave(self, client: Client) -> None:
        """The client is gone: its requests are cancelled and nobody is told."""
        for core_key in client.keys.values():
            self._send(Cancel(core_key))
        client.deliver = _discard

    async def stepped(self, message: Stepped) -> None:
        """Deals a step's updates out to their clients, one list each, and its cache events to the feeds."""
        shares: dict[int, tuple[Client, list[Update]]] = {}
        for update in message.updates:
            owner = self._owners.get(update.key)
            if owner is None:
                continue  # cut off before the core heard of it
            client, key = owner
            if update.finished is not None:
                self._forget(update.key)
            _, share = shares.setdefault(id(client), (client, []))
            share.append(update._replace(key=key))
        for client, share in shares.values():
            client.deliver(share)
        self._publish(message.stored, message.removed)
        self.load = message.load
        await self.notify()

    async def notify(self) -> None:
        """Wakes those who watch the load or the phase."""
        async with self.load_changed:
            self.load_changed.notify_all()

    async def inspect(self, max_cells: int, max_sequences: int) -> Inspection:
        """What the core holds, between two steps. Raises UnavailableError if it is gone."""
        if not self._core_has_work:
            self.progressed()
        ticket = next(self._tickets)
        answer: asyncio.Future[Inspection] = asyncio.get_running_loop().create_future()
        self._inspections[ticket] = answer
        self._send(Inspect(ticket, max_cells, max_sequences))
        try:
            return await answer
        finally:
            del self._inspections[ticket]

    def inspected(self, message: Inspected) -> None:
        """The core has answered; whoever asked may be gone."""
        self.load = message.load
        if (answer := self._inspections.get(message.ticket)) is not None and not answer.done():
            answer.set_result(message.inspection)

    def fail_all(self, error: QuireError) -> None:
        """The core is gone: every request ends with `error`."""
        for answer in self._inspections.values():
            if not answer.done():
                answer.set_exception(error)
        for core_key, (client, key) in list(self._owners.items()):
            self._forget(core_key)
            client.deliver([Update(key, finished=Finished(FinishReason.ERROR, error))])

    def cut_off(self) -> int:
        """Ends what is still in flight after a drain's grace period; returns how many that were."""
        count = self.in_flight
        for core_key in self._owners:
            self._send(Cancel(core_key))
        self.fail_all(UnavailableError("the engine is shutting down: send the request to another"))
        return count

    async def until_idle(self) -> None:
        """Returns when nothing is in flight."""
        await self._idle.wait()

    def subscribe(self) -> CacheFeed:
        """A feed that begins with a snapshot."""
        feed = CacheFeed(CacheEvent(self.cache_sequence, tuple(self._pages), snapshot=True))
        self._feeds.add(feed)
        return feed

    def unsubscribe(self, feed: CacheFeed) -> None:
        """Ends a subscription."""
        self._feeds.discard(feed)

    def _publish(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        stored, removed = tuple(stored), tuple(removed)
        if not stored and not removed:
            return
        for page_hash in removed:
            del self._pages[page_hash]
        for page_hash in stored:
            self._pages[page_hash] = None
        self.cache_sequence += 1
        event = CacheEvent(self.cache_sequence, stored, removed)
        for feed in self._feeds:
            feed.push(event)

    @property
    def _core_has_work(self) -> bool:
        return bool(self._owners or self._inspections)

    def _forget(self, core_key: int) -> None:
        client, key = self._owners.pop(core_key)
        del client.keys[key]
        if not self._owners:
            self._idle.set()


def _discard(updates: list[Update]) -> None:
    """Where the updates of a client that is gone go."""

"""The server's books: whose request is whose, what subscribers of the cache see, what a cut-off drain leaves."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
from hypothesis import given, settings

from quire.engine.hub import CacheFeed, Client, Hub
from quire.engine.messages import Cancel, Load, Stepped, Submit, ToCore
from quire.engine.stats import EngineStats
from quire.service.errors import UnavailableError
from quire.service.request import Finished, FinishReason, Request, SamplingParams, StopConditions, Update

LOAD = Load(0, 0, 0, 10, 10, 0, 0, EngineStats())
REQUEST = Request("r", "m", (1, 2), SamplingParams(), StopConditions(5))
STOP = Finished(FinishReason.STOP)


def stepped(*updates: Update, stored: tuple[bytes, ...] = (), removed: tuple[bytes, ...] = ()) -> Stepped:
    return Stepped(updates, stored, removed, LOAD)


def a_hub() -> tuple[Hub, list[ToCore]]:
    sent: list[ToCore] = []
    return Hub(sent.append, epoch=7), sent


async def test_a_step_is_dealt_out_once_per_client() -> None:
    """One frame a step and peer is what keeps the token path cheap; keys of two peers may be equal."""
    hub, sent = a_hub()
    one, two = [], []
    first, second = Client(one.append), Client(two.append)
    hub.submit(first, 1, REQUEST)
    hub.submit(first, 2, REQUEST)
    hub.submit(second, 1, REQUEST)
    keys = [message.key for message in sent if isinstance(message, Submit)]
    assert len(set(keys)) == 3
    await hub.stepped(stepped(*(Update(key, (10 + index,)) for index, key in enumerate(keys))))
    assert one == [[Update(1, (10,)), Update(2, (11,))]] and two == [[Update(1, (12,))]]
    await hub.stepped(stepped(Update(keys[2], (), None, STOP)))
    assert two[-1] == [Update(1, (), None, STOP)] and hub.in_flight == 2


async def test_a_client_that_left_hears_nothing_and_its_requests_are_cancelled() -> None:
    """A closed session must free its pages, and a late token must not reach its closed queue."""
    hub, sent = a_hub()
    heard: list[list[Update]] = []
    client = Client(heard.append)
    hub.submit(client, 1, REQUEST)
    hub.leave(client)
    key = sent[0].key if isinstance(sent[0], Submit) else 0
    assert sent[1:] == [Cancel(key)]
    await hub.stepped(stepped(Update(key, (5,), None, Finished(FinishReason.CANCELLED))))
    assert heard == [] and hub.in_flight == 0


async def test_a_cut_off_request_ends_once() -> None:
    """The core's own terminal event comes after the drain gave up on it: the client must not see a second one."""
    hub, sent = a_hub()
    heard: list[list[Update]] = []
    hub.submit(Client(heard.append), 1, REQUEST)
    assert hub.cut_off() == 1
    (update,) = heard[0]
    assert update.finished is not None and isinstance(update.finished.error, UnavailableError)
    key = sent[0].key if isinstance(sent[0], Submit) else 0
    await hub.stepped(stepped(Update(key, (), None, Finished(FinishReason.CANCELLED))))
    assert len(heard) == 1
    await asyncio.wait_for(hub.until_idle(), 1)


@given(st.lists(st.sets(st.integers(0, 8)), max_size=12), st.integers(0, 11))
@settings(deadline=None)
def test_snapshot_and_deltas_add_up_whenever_one_subscribes(held: list[set[int]], when: int) -> None:
    """A subscriber at any moment must end with exactly the pages that are there, without a gap in the sequence."""

    async def scenario() -> None:
        hub, _ = a_hub()
        feed: CacheFeed | None = None
        before: set[int] = set()
        for index, pages in enumerate([*held, set()]):
            if index == when:
                feed = hub.subscribe()
            stored, removed = pages - before, before - pages
            await hub.stepped(stepped(stored=tuple(map(name, stored)), removed=tuple(map(name, removed))))
            before = pages
        feed = feed or hub.subscribe()
        hub.unsubscribe(feed)
        snapshot = await feed.next()
        assert snapshot is not None and snapshot.snapshot
        seen, sequence = set(snapshot.stored), snapshot.sequence
        while feed._events:
            event = await feed.next()
            assert event is not None and event.sequence == sequence + 1
            sequence = event.sequence
            assert seen >= set(event.removed)
            seen = (seen - set(event.removed)) | set(event.stored)
        assert seen == {name(page) for page in before}

    asyncio.run(scenario())


async def test_a_subscriber_that_does_not_read_is_dropped() -> None:
    """A stalled router must not grow the engine's memory; it is told to start over."""
    hub, _ = a_hub()
    feed = hub.subscribe()
    for page in range(CacheFeed.LIMIT + 5):
        await hub.stepped(stepped(stored=(name(page),)))
    assert feed.overrun and len(feed._events) == CacheFeed.LIMIT
    assert await feed.next() is None


def name(page: int) -> bytes:
    return page.to_bytes(16, "little")

"""The router's copy of an engine's cache follows it over a real connection: snapshot, changes, gaps, new lives."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import FakeEngine
from router_testing import (
    assert_whole,
    connected,
    endpoint_of,
    engines,
    gateway,
    holder_of,
    metric,
    prompt_of,
    request_of,
    router,
    until,
)

from quire.router.index import page_keys
from quire.router.service import RouterService
from quire.service.pages import prefix_hashes
from quire.service.request import CacheKey
from quire.v1 import engine_pb2


def known(service: RouterService, fake: FakeEngine, prompt: tuple[int, ...]) -> int:
    """How many pages of `prompt` the router believes `fake` to hold."""
    keys = page_keys(b"".join(prefix_hashes(CacheKey(), prompt)))
    return service.router.fleet.index.match(keys).get(endpoint_of(service, fake).cache.holder, 0)


async def test_a_prefix_is_found_however_the_router_heard_of_it(tmp_path: Path) -> None:
    """What was there before the router came is in the snapshot, what came later in an event, and what went is gone."""
    async with engines(tmp_path, 2) as fakes:
        fakes[1].store(prompt_of(1))
        async with router(tmp_path, fakes) as service, gateway(service) as session:
            fakes[0].store(prompt_of(2))
            await until(lambda: known(service, fakes[0], prompt_of(2)) == 4)
            for topic, fake in ((1, fakes[1]), (2, fakes[0])):
                request = request_of(prompt_of(topic))
                stream = session.submit(request)
                await assert_whole(stream, request)
                assert holder_of(fakes, request) is fake
                assert stream.started is not None and stream.started.cached_tokens == 64
            assert metric(service, "prefix_hit_tokens_total", engine=fakes[1].address) == 64
            assert metric(service, "expected_prefix_hit_tokens_total") == 128
            fakes[0].evict(prefix_hashes(CacheKey(), prompt_of(2))[1:])
            await until(lambda: known(service, fakes[0], prompt_of(2)) == 1)


async def test_a_lost_event_is_made_up_for_by_a_snapshot(tmp_path: Path) -> None:
    """After a gap nothing later can be trusted: the router asks for everything again, and its session stands."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        (fake,) = fakes
        fake.lose_event(prompt_of(1))
        fake.set_load(cache_sequence=1)
        await until(lambda: metric(service, "cache_lag_events", engine=fake.address) == 1)
        assert known(service, fake, prompt_of(1)) == 0
        fake.store(prompt_of(2))
        await until(lambda: known(service, fake, prompt_of(1)) == known(service, fake, prompt_of(2)) == 4)
        assert (fake.subscriptions, fake.sessions_opened) == (2, 1)
        assert metric(service, "cache_gaps_total", engine=fake.address) == 1
        assert metric(service, "cache_lag_events", engine=fake.address) == 0


async def test_a_watch_that_ends_alone_is_opened_again(tmp_path: Path) -> None:
    """What happened in between is in the new snapshot; what was known stays in use until then, and streams run on."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        (fake,) = fakes
        fake.store(prompt_of(1))
        await until(lambda: known(service, fake, prompt_of(1)) == 4)
        fake.hold_at(2)
        request = request_of(prompt_of(3))
        stream = session.submit(request)
        await stream.until_tokens(2)
        fake.end_cache_watches()
        fake.lose_event(prompt_of(2))
        assert known(service, fake, prompt_of(1)) == 4
        await until(lambda: known(service, fake, prompt_of(2)) == 4)
        fake.evict(prefix_hashes(CacheKey(), prompt_of(1)))
        await until(lambda: known(service, fake, prompt_of(1)) == 0)
        fake.hold_at(None)
        await assert_whole(stream, request)
        assert (fake.subscriptions, fake.sessions_opened) == (2, 1)


async def test_an_engine_in_a_new_life_has_none_of_its_old_pages(tmp_path: Path) -> None:
    """A restarted pod is empty: believing otherwise would send it prompts that it must compute from the start."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        (fake,) = fakes
        fake.store(prompt_of(1))
        await until(lambda: known(service, fake, prompt_of(1)) == 4)
        await fake.kill()
        await until(lambda: not service.router.fleet.ready)
        assert known(service, fake, prompt_of(1)) == 0
        await fake.start()
        await until(lambda: connected(service, 1))
        assert endpoint_of(service, fake).cache.epoch == 2
        assert known(service, fake, prompt_of(1)) == 0
        fake.store(prompt_of(2))
        await until(lambda: known(service, fake, prompt_of(2)) == 4)
        await until(lambda: metric(service, "index_pages") == 4)


async def test_an_event_of_another_epoch_voids_what_was_known(tmp_path: Path) -> None:
    """Without a broken connection, too: the epoch alone says that the cache is another one."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        (fake,) = fakes
        fake.store(prompt_of(1))
        await until(lambda: known(service, fake, prompt_of(1)) == 4)
        fake.restart_cache()
        delta = engine_pb2.CacheDelta(stored=b"".join(prefix_hashes(CacheKey(), prompt_of(2))))
        fake.send_cache_event(engine_pb2.WatchCacheResponse(epoch=2, sequence=2, delta=delta))
        await until(lambda: fake.subscriptions == 2 and endpoint_of(service, fake).cache.epoch == 2)
        assert known(service, fake, prompt_of(1)) == known(service, fake, prompt_of(2)) == 0
        assert fake.sessions_opened == 1


async def test_a_snapshot_of_many_pages_is_taken_while_streams_go_on(tmp_path: Path) -> None:
    """A hundred thousand pages take the router a tenth of a second, and no token may wait for that."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        stored = bytes(range(256)) * (16 * 6250)
        numbered = b"".join(
            number.to_bytes(4, "little") + stored[start + 4 : start + 16]
            for number, start in enumerate(range(0, len(stored), 16))
        )
        request = request_of(prompt_of(1), 100_000)
        stream = session.submit(request)
        await stream.until_tokens(1)
        index = service.router.fleet.index
        snapshot = engine_pb2.CacheSnapshot(stored=numbered)
        fakes[1].send_cache_event(engine_pb2.WatchCacheResponse(epoch=1, sequence=9, snapshot=snapshot))
        await until(lambda: len(index) > 10_000)
        assert endpoint_of(service, fakes[1]).cache.sequence < 9
        before = len(stream.token_ids)
        await until(lambda: endpoint_of(service, fakes[1]).cache.sequence == 9)
        assert len(stream.token_ids) - before >= 5
        assert len(index) >= 100_000
        session.cancel(stream)
        await stream.result()


@pytest.mark.parametrize(
    "event",
    [
        engine_pb2.WatchCacheResponse(epoch=1, sequence=1),
        engine_pb2.WatchCacheResponse(epoch=1, sequence=1, delta=engine_pb2.CacheDelta(stored=b"short")),
        engine_pb2.WatchCacheResponse(epoch=1, sequence=0, snapshot=engine_pb2.CacheSnapshot(stored=b"short")),
    ],
)
async def test_events_that_make_no_sense_cost_the_engine_its_session(
    tmp_path: Path, event: engine_pb2.WatchCacheResponse
) -> None:
    """An engine of another version must not fill the index with nonsense; its streams go on elsewhere."""
    async with engines(tmp_path, 2) as fakes, router(tmp_path, fakes) as service, gateway(service) as session:
        for fake in fakes:
            fake.hold_at(2)
        request = request_of(prompt_of(1))
        stream = session.submit(request)
        await stream.until_tokens(2)
        holder = holder_of(fakes, request)
        holder.send_cache_event(event)
        for fake in fakes:
            if fake is not holder:
                fake.hold_at(None)
        await assert_whole(stream, request)
        assert not endpoint_of(service, holder).routable


async def test_a_phase_that_is_not_known_costs_the_engine_its_session(tmp_path: Path) -> None:
    """The same for load reports: unknown enum values are errors, not defaults."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        fakes[0].set_load(phase=77)
        await until(lambda: not service.router.fleet.ready)
        assert metric(service, "engine_losses_total", engine=fakes[0].address) == 1


async def test_an_engine_is_ready_when_it_says_so(tmp_path: Path) -> None:
    """One that loads refuses the session; one that fails says so in its load, and gets nothing."""
    async with engines(tmp_path, 1) as fakes, router(tmp_path, fakes) as service:
        fakes[0].set_load(phase=engine_pb2.ENGINE_PHASE_FAILED)
        await until(lambda: endpoint_of(service, fakes[0]).state == "failed")
        assert metric(service, "engine_ready", engine=fakes[0].address) == 0
        fakes[0].set_load(phase=engine_pb2.ENGINE_PHASE_READY)
        await until(lambda: service.router.ready)
        assert metric(service, "engine_ready", engine=fakes[0].address) == 1

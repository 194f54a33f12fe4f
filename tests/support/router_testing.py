"""What tests of the router share: engines and a router on real sockets, prompts, and waiting for what shows outside."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fake_engine import MODEL, FakeEngine, output_of
from session_client import SessionClient, Stream

from quire.router.config import RouterConfig
from quire.router.service import RouterService
from quire.service.pages import PAGE_SIZE
from quire.service.request import Finished, FinishReason, Request, SamplingParams, StopConditions

DEADLINE = 10.0

_ids = itertools.count(1)


def prompt_of(topic: int, pages: int = 4, extra: int = 1) -> tuple[int, ...]:
    """`pages` full pages that share nothing with other topics, and `extra` tokens."""
    return tuple(topic * 100_000 + position for position in range(pages * PAGE_SIZE + extra))


def request_of(prompt: Sequence[int], max_tokens: int = 8, *, model: str = MODEL, **fields: Any) -> Request:
    """A greedy request with an id of its own."""
    stop = StopConditions(max_tokens, tuple(fields.pop("stop_token_ids", ())))
    sampling = fields.pop("sampling", SamplingParams(temperature=0.0))
    return Request(f"request-{next(_ids)}", model, tuple(prompt), sampling, stop, **fields)


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Returns when `condition()` holds: for what can only be seen from outside."""
    async with asyncio.timeout(DEADLINE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


async def assert_whole(stream: Stream, request: Request, reason: FinishReason = FinishReason.LENGTH) -> None:
    """The stream ends once and for this reason, and holds every token once, wherever it ran."""
    finished = await stream.result()
    assert finished == Finished(reason)
    assert stream.terminal_events == 1
    assert stream.token_ids == output_of(request.prompt_token_ids, request.stop.max_tokens)
    assert stream.rejected_drafts == len(stream.token_ids)


@asynccontextmanager
async def engines(tmp_path: Path, count: int, **options: Any) -> AsyncIterator[list[FakeEngine]]:
    """Engines that listen on sockets in `tmp_path`."""
    fakes = [FakeEngine(f"unix:{tmp_path}/engine-{index}", f"engine-{index}", **options) for index in range(count)]
    try:
        for fake in fakes:
            await fake.start()
        yield fakes
    finally:
        for fake in fakes:
            await fake.kill()


@asynccontextmanager
async def router(
    tmp_path: Path, fakes: Sequence[FakeEngine], *, name: str = "router", wait: bool = True, **config: Any
) -> AsyncIterator[RouterService]:
    """A router of these engines, connected to all of them unless `wait` is off. It leaves no task behind."""
    outermost = not _tasks()
    addresses = config.pop("engines", tuple(fake.address for fake in fakes))
    settings = {"grace": 0.2, "load_interval": 0.01, **config}
    service = RouterService(RouterConfig(f"unix:{tmp_path}/{name}", addresses, name, **settings))
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        await until_or_failed(running, service.started.is_set)
        if wait:
            await until_or_failed(running, lambda: connected(service, len(fakes)))
        yield service
    finally:
        stop.set()
        await asyncio.wait_for(running, DEADLINE)
        assert_nothing_held(service)
    if outermost:
        # Those of calls that gRPC has just cancelled end with the loop's next turns.
        await until(lambda: not _tasks())


async def until_or_failed(running: asyncio.Task[None], condition: Callable[[], object]) -> None:
    await until(lambda: running.done() or condition())
    if running.done():
        running.result()


def connected(service: RouterService, count: int) -> bool:
    """Whether `count` engines are ready and their pages known."""
    ready = [each for each in service.router.fleet.endpoints if each.routable and each.cache.epoch is not None]
    return len(ready) >= count


def assert_nothing_held(service: RouterService) -> None:
    """No request, page in progress or token that was sent is left, whatever happened."""
    for endpoint in service.router.fleet.endpoints:
        assert not endpoint.flights
        assert not endpoint.in_progress
        assert endpoint._unreported_tokens == 0


def endpoint_of(service: RouterService, fake: FakeEngine) -> Any:
    """What the router knows of an engine."""
    return next(each for each in service.router.fleet.endpoints if each.address == fake.address)


def metric(service: RouterService, name: str, **labels: str) -> float:
    """The value of a metric, 0 if it has none."""
    return service.metrics.registry.get_sample_value(f"quire_router_{name}", labels) or 0.0


def holder_of(fakes: Sequence[FakeEngine], request: Request) -> FakeEngine:
    """The engine that was sent `request` last."""
    having = [fake for fake in fakes if any(each.request_id == request.request_id for each in fake.submitted)]
    return having[-1]


@asynccontextmanager
async def gateway(service: RouterService) -> AsyncIterator[SessionClient]:
    """A session with the router."""
    async with SessionClient(service.address) as session:
        yield session


def _tasks() -> list[asyncio.Task[Any]]:
    """The tasks of routers."""
    codes = {task: getattr(task.get_coro(), "cr_code", None) for task in asyncio.all_tasks()}
    return [task for task, code in codes.items() if code is not None and "/quire/router/" in code.co_filename]

"""When to look at which service: one task for each, woken by what happens, after a pause when a look has failed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import aiohttp

from quire.operator.cluster import ApiException
from quire.operator.metrics import OperatorMetrics
from quire.operator.spec import Key

logger = logging.getLogger(__name__)

# What comes in such a bunch is one look and one status: a Deployment's progress is a dozen events.
_GATHER_SECONDS = 0.7
_FIRST_RETRY, _LAST_RETRY = 0.5, 60.0


class WakeQueue:
    """Runs `look` for services that were woken: never twice at a time for one, and for `workers` of them at once.

    `look` returns after how many seconds it wants to be called again, None if only a wake is to do that.
    """

    def __init__(
        self, look: Callable[[Key], Awaitable[float | None]], *, workers: int, metrics: OperatorMetrics
    ) -> None:
        self._look = look
        self._slots = asyncio.Semaphore(workers)
        self._metrics = metrics
        self._wakes: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        # Has the exception of a look that no other try would put right, which is a bug.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self, key: Key) -> None:
        """The service is new, or something about it may have changed."""
        if key not in self._wakes:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._keep(key, self._wakes[key]))
            self._tasks[key].add_done_callback(self._ended)
            self._metrics.services.set(len(self._wakes))
        self._wakes[key].set()

    def remove(self, key: Key) -> None:
        """The service is gone."""
        if task := self._tasks.pop(key, None):
            task.cancel()
        self._wakes.pop(key, None)
        self._metrics.services.set(len(self._wakes))

    async def close(self) -> None:
        """Ends all looks."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.failed.done():
            self.failed.set_exception(error)

    async def _keep(self, key: Key, wake: asyncio.Event) -> None:
        retry, wait = _FIRST_RETRY, None
        while True:
            wake.clear()
            try:
                async with self._slots:
                    with self._metrics.seconds.time():
                        wait = await self._look(key)
                retry = _FIRST_RETRY
            except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                self._metrics.failures.inc()
                reason = str(getattr(error, "reason", "") or error or type(error).__name__)
                logger.warning("will try again: %s", reason, extra={"service": f"{key.namespace}/{key.name}"})
                wait = retry * random.uniform(0.8, 1.2)
                retry = min(2 * retry, _LAST_RETRY)
            await _wait(wake, wait)
            await asyncio.sleep(_GATHER_SECONDS)


async def _wait(wake: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        pass

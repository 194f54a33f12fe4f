"""Which of several operators acts: the one that holds a Lease.

The package has the election; what it lacks is patience with an API server that is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from quire.operator.config import OperatorConfig

logger = logging.getLogger(__name__)

_AWAY = (aiohttp.ClientError, TimeoutError, OSError)


class _PatientLock(LeaseLock):
    """A Lease whose server may be away or silent: the attempt has failed then, and the next one may not."""

    def __init__(self, config: OperatorConfig, api: client.ApiClient, answer_seconds: float) -> None:
        super().__init__(config.lease, config.namespace, config.identity, api)
        self._answer_seconds = answer_seconds

    async def get(self, name: str, namespace: str) -> Any:
        try:
            async with asyncio.timeout(self._answer_seconds):
                return await super().get(name, namespace)
        except _AWAY as error:
            return False, client.ApiException(status=0, reason=str(error) or type(error).__name__)

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        return await self._attempt(self._create(name, namespace, election_record))

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        return await self._attempt(super().update(name, namespace, updated_record))

    async def release(self) -> None:
        """Lets another lead at once; without it that takes the lease's duration."""
        nobody = {"spec": {"holderIdentity": None}}
        try:
            async with asyncio.timeout(self._answer_seconds):
                await self.api_instance.patch_namespaced_lease(self.name, self.namespace, nobody)
        except (*_AWAY, client.ApiException) as error:
            logger.warning("can't release the lease: %s", str(error) or type(error).__name__)

    async def _create(self, name: str, namespace: str, election_record: Any) -> bool:
        # The package's own passes an argument that its client refuses.
        lease = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, lease)
        except client.ApiException as error:
            logger.warning("can't create the lease: %s", error.reason)
            return False
        return True

    async def _attempt(self, request: Awaitable[bool]) -> bool:
        try:
            async with asyncio.timeout(self._answer_seconds):
                return await request
        except _AWAY as error:
            logger.warning("can't write the lease: %s", str(error) or type(error).__name__)
            return False


async def lead(
    config: OperatorConfig, api: client.ApiClient, act: Callable[[], Coroutine[Any, Any, None]], stop: asyncio.Event
) -> None:
    """Waits for the lease and runs `act` while it is held; `act` ends by itself once `stop` is set.

    Returns when `act` has ended, when `stop` was set before it began, or when the lease is lost.
    """
    retry = max(1.0, config.lease_duration / 8)
    begun: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    async def started() -> None:
        acting = asyncio.create_task(act())
        begun.set_result(acting)
        await acting

    lock = _PatientLock(config, api, retry)
    election = LeaderElection(
        Config(
            lock=lock,
            lease_duration=config.lease_duration,
            renew_deadline=config.lease_duration * 2 / 3,
            retry_period=retry,
            onstarted_leading=started,
            onstopped_leading=None,  # type: ignore[arg-type]
        )
    )
    running = asyncio.create_task(election.run())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((running, begun, stopped), return_when=asyncio.FIRST_COMPLETED)
    if begun.done():
        await asyncio.wait((running, begun.result()), return_when=asyncio.FIRST_COMPLETED)
    is_held = begun.done() and not running.done()
    if running.done() and not running.cancelled():
        # The election ends by itself only when the lease is lost, or by a fault that must not go unseen.
        await running
    for task in (running, stopped):
        task.cancel()
    await asyncio.gather(running, stopped, *([begun.result()] if begun.done() else []), return_exceptions=True)
    if is_held:
        await lock.release()
        await begun.result()

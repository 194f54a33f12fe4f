"""Fills the store from lists: at the start, from time to time, and when a watch had to begin anew.

Kopf's watches list again after they were away for too long, and then nobody is told of what has gone meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import aiohttp

from quire.operator import names
from quire.operator.cluster import ApiException, Cluster
from quire.operator.kinds import CHILDREN, OPTIONAL, POD, SERVICE, Kind
from quire.operator.resources.metadata import Manifest
from quire.operator.spec import Key
from quire.operator.store import Store, slim

logger = logging.getLogger(__name__)

# What belongs to services is labelled; services are whoever's.
LABELLED = (*CHILDREN, POD)
SELECTOR = f"{names.MANAGED_BY}={names.FIELD_MANAGER}"

_RETRY_SECONDS = 2.0


async def fill(cluster: Cluster, store: Store, kinds: Iterable[Kind] = (SERVICE, *LABELLED)) -> set[Key]:
    """Lists all objects of these kinds into the store; returns the services about which there was news.

    Optional kinds are left out where the cluster does not have them.
    """
    news: set[Key] = set()
    for kind in kinds:
        found: list[Manifest] = []
        at = 0
        if kind in OPTIONAL and not await cluster.serves(kind):
            continue
        async for page, version in cluster.pages(kind, SELECTOR if kind in LABELLED else ""):
            found += [slim(kind, each) for each in page]
            at = version
        news |= store.replace(kind, found, at)
    return news


class Listing:
    """Lists again every `resync` seconds, and kinds that `ask` names at once. `wake` is told of whom there was news."""

    def __init__(self, cluster: Cluster, store: Store, *, resync: float, wake: Callable[[Key], None]) -> None:
        self._cluster = cluster
        self._store = store
        self._resync = resync
        self._wake = wake
        self._asked: set[Kind] = set()
        self._news = asyncio.Event()

    def ask(self, kind: Kind) -> None:
        """The kind's watch has begun anew."""
        self._asked.add(kind)
        self._news.set()

    async def run(self) -> None:
        """Never ends."""
        while True:
            try:
                async with asyncio.timeout(self._resync):
                    await self._news.wait()
            except TimeoutError:
                self._asked |= {SERVICE, *LABELLED}
            # A list comes as one event for each of its objects.
            await asyncio.sleep(_RETRY_SECONDS)
            self._news.clear()
            kinds, self._asked = self._asked, set()
            try:
                for key in await fill(self._cluster, self._store, kinds):
                    self._wake(key)
            except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.warning("can't list, will try again: %s", str(error) or type(error).__name__)
                self._asked |= kinds
                self._news.set()

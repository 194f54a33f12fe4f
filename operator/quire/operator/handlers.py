"""Kopf's side: it watches services, their children and their pods, keeps the store true and wakes who is concerned.

Nothing is decided here and no handler writes, so kopf puts neither finalizers nor annotations on anything: a service
can be deleted, and the CRD too, while no operator runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import kopf

from quire.operator.cluster import Cluster
from quire.operator.config import OperatorConfig
from quire.operator.kinds import OPTIONAL, SERVICE, Kind
from quire.operator.listing import LABELLED, SELECTOR, Listing, fill
from quire.operator.metrics import OperatorMetrics
from quire.operator.queue import WakeQueue
from quire.operator.reconciler import Reconciler
from quire.operator.scaler import Scaler
from quire.operator.spec import Key
from quire.operator.store import Store


class Watching:
    """All that keeps services while this process leads."""

    def __init__(self, cluster: Cluster, config: OperatorConfig, metrics: OperatorMetrics) -> None:
        self._cluster = cluster
        self._store = Store()
        self._scaler = Scaler(self._concern, interval=config.scale_interval)
        reconciler = Reconciler(cluster, self._store, config, self._scaler.follow)
        self._queue = WakeQueue(reconciler.reconcile, workers=config.workers, metrics=metrics)
        self._listing = Listing(cluster, self._store, resync=config.resync, wake=self._concern)

    async def run(self, stop: asyncio.Event) -> None:
        """Watches until `stop` is set, or SIGTERM sets it."""
        # Before the first look: what is not in the store yet would be made again.
        for key in await fill(self._cluster, self._store):
            self._concern(key)
        listing = asyncio.create_task(self._listing.run())
        watching = asyncio.ensure_future(
            kopf.operator(
                registry=self._registry(stop), settings=_settings(), clusterwide=True, standalone=True, stop_flag=stop
            )
        )
        try:
            await asyncio.wait((watching, self._queue.failed), return_when=asyncio.FIRST_COMPLETED)
            # A service that nobody looks at any more must not go unnoticed: this process ends, and its successor looks.
            stop.set()
            await watching
            if self._queue.failed.done():
                self._queue.failed.result()
        finally:
            watching.cancel()
            listing.cancel()
            await self._close()

    def _concern(self, key: Key) -> None:
        """Something about the service may have changed; it may be gone."""
        if self._store.service(key) is None:
            self._queue.remove(key)
            self._scaler.forget(key)
        else:
            self._queue.wake(key)

    def _registry(self, stop: asyncio.Event) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        def login(**arguments: Any) -> kopf.ConnectionInfo | None:
            # In a pod its account; elsewhere a kubeconfig.
            return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

        @kopf.on.cleanup(registry=registry)
        async def stopped(**_: Any) -> None:
            # Kopf hears SIGTERM itself, and waits in vain for tasks that are still there when it ends: its own that
            # waits for `stop` is one of them.
            stop.set()
            await self._close()

        # Optional kinds come and go with their projects, and a watch would end with them: lists have to do.
        for kind in (SERVICE, *LABELLED):
            if kind in OPTIONAL:
                continue
            subscribe = kopf.on.event(kind.group, _version(kind), kind.plural, registry=registry, id=kind.plural)
            subscribe(self._handler(kind))
        return registry

    def _handler(self, kind: Kind) -> Callable[..., Awaitable[None]]:
        async def changed(event: Any, **_: Any) -> None:
            if event["type"] is None:
                # The watch has begun, or begun anew: it does not tell of what has gone before.
                self._listing.ask(kind)
            if key := self._store.hear(kind, event["object"], is_gone=event["type"] == "DELETED"):
                self._concern(key)

        return changed

    async def _close(self) -> None:
        await self._queue.close()
        await self._scaler.close()


class _NoDiffs(kopf.DiffBaseStorage):
    """Kopf looks for what has changed in an object since a handler saw it, which costs most of its time; none asks."""

    def build(self, **_: Any) -> Any:
        """Nothing of an object matters."""
        return {}

    def fetch(self, **_: Any) -> Any:
        """Nor was it ever seen."""
        return None

    def store(self, **_: Any) -> None:
        """So there is nothing to keep."""


def _version(kind: Kind) -> str:
    return kind.api_version.rpartition("/")[2]


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # The API server sends what is labelled, not every pod of the cluster.
    for kind in LABELLED:
        settings.watching.label_selectors[kind.group, kind.plural] = SELECTOR
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 270
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = _NoDiffs()
    # Kinds are known beforehand: their discovery needs rights that nothing else does.
    settings.scanning.disabled = True
    return settings

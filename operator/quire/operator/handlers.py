"""Kopf's side: it watches services, their children and their pods, and wakes those that are concerned.

Nothing is decided here and no handler writes, so kopf puts neither finalizers nor annotations on anything: a service
can be deleted, and the CRD too, while no operator runs.
"""

from __future__ import annotations

import asyncio
from typing import Any

import kopf

from quire.operator import names
from quire.operator.kinds import CHILDREN, POD, SERVICE, Kind
from quire.operator.queue import WakeQueue
from quire.operator.scaler import Scaler
from quire.operator.spec import Key


async def watch(queue: WakeQueue, scaler: Scaler, stop: asyncio.Event) -> None:
    """Runs kopf until `stop` is set, or SIGTERM sets it."""
    await kopf.operator(
        registry=_registry(queue, scaler, stop),
        settings=_settings(),
        clusterwide=True,
        standalone=True,
        stop_flag=stop,
    )


def _registry(queue: WakeQueue, scaler: Scaler, stop: asyncio.Event) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        # In a pod its account; elsewhere a kubeconfig.
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    @kopf.on.event(SERVICE.group, names.VERSION, SERVICE.plural, registry=registry)
    async def service_changed(event: Any, namespace: str, name: str, **_: Any) -> None:
        key = Key(namespace, name)
        if event["type"] == "DELETED":
            queue.remove(key)
            scaler.forget(key)
        else:
            queue.add(key)

    @kopf.on.cleanup(registry=registry)
    async def stopped(**_: Any) -> None:
        # Kopf hears SIGTERM itself, and waits in vain for tasks that are still there when it ends: its own that waits
        # for `stop` is one of them.
        stop.set()
        await queue.close()
        await scaler.close()

    async def child_changed(namespace: str, labels: Any, **_: Any) -> None:
        queue.wake(Key(namespace, labels.get(names.SERVICE, "")))

    for kind in (*CHILDREN, POD):
        kopf.on.event(kind.group, _version(kind), kind.plural, registry=registry, id=f"{kind.plural}-changed")(
            child_changed
        )
    return registry


def _version(kind: Kind) -> str:
    return kind.api_version.rpartition("/")[2]


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    # The API server sends what is labelled, not every pod of the cluster.
    for kind in (*CHILDREN, POD):
        settings.watching.label_selectors[kind.group, kind.plural] = f"{names.MANAGED_BY}={names.FIELD_MANAGER}"
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 270
    settings.posting.enabled = False
    # Kinds are known beforehand: their discovery needs rights that nothing else does.
    settings.scanning.disabled = True
    return settings

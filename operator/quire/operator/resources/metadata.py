"""Names, labels and owners of what the operator makes."""

from __future__ import annotations

import hashlib
import json
from enum import Enum
from typing import Any, TypeAlias

from quire.operator import names
from quire.operator.spec import InferenceService

# An object as the API's JSON has it.
Manifest: TypeAlias = dict[str, Any]


class Component(Enum):
    """The kinds of pods that a service has."""

    GATEWAY = "gateway"
    ROUTER = "router"
    ENGINE = "engine"
    # Engines of another kind, while a change is tried.
    CANARY = "canary"
    # The further pods of engines that span nodes. Nobody but their own engine's first pod talks to them.
    ENGINE_WORKER = "engine-worker"
    CANARY_WORKER = "canary-worker"

    @property
    def field(self) -> str:
        """Which part of the spec they are made of."""
        return self.value if self in (Component.GATEWAY, Component.ROUTER) else Component.ENGINE.value

    @property
    def worker(self) -> Component:
        """The further pods of these engines."""
        return {Component.ENGINE: Component.ENGINE_WORKER, Component.CANARY: Component.CANARY_WORKER}[self]

    @property
    def leader(self) -> Component:
        """The pods that serve, of these or of the engines that these belong to."""
        leaders = {Component.ENGINE_WORKER: Component.ENGINE, Component.CANARY_WORKER: Component.CANARY}
        return leaders.get(self, self)


LASTING = (Component.GATEWAY, Component.ROUTER, Component.ENGINE)


def child_name(service: InferenceService, component: Component) -> str:
    """What the component's objects are called."""
    return f"{service.name}-{component.value}"


def selector(service: InferenceService, component: Component) -> dict[str, str]:
    """Labels that the component's pods have and no others."""
    return {names.SERVICE: service.name, names.COMPONENT: component.value}


def labels(service: InferenceService, component: Component | None = None) -> dict[str, str]:
    """What every object of the service is labelled with."""
    common = {
        "app.kubernetes.io/name": "quire",
        "app.kubernetes.io/instance": service.name,
        names.MANAGED_BY: names.FIELD_MANAGER,
        names.SERVICE: service.name,
    }
    return common | ({names.COMPONENT: component.value} if component else {})


def manifest(
    service: InferenceService,
    api_version: str,
    kind: str,
    name: str,
    *,
    component: Component | None = None,
    **parts: Any,
) -> Manifest:
    """An object of the service: it goes when the service goes. `parts` are what it has beside its metadata."""
    metadata: Manifest = {"name": name, "namespace": service.namespace, "labels": labels(service, component)}
    if service.uid:
        metadata["ownerReferences"] = [
            {
                "apiVersion": names.API_VERSION,
                "kind": names.KIND,
                "name": service.name,
                "uid": service.uid,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **parts}


def digest(value: object) -> str:
    """A short hash of plain data, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

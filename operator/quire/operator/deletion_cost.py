"""Which engines should go first when there are to be fewer: those that lose least. Pure.

A ReplicaSet deletes pods in the order of their annotation, so it is set before the number is lowered. What an engine
loses is what others have to compute again for the requests that move there: its pages in use. Engines that span nodes
go by their number, the last one first, since a StatefulSet looks at nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.operator.observed import Observed
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.spec import InferenceService

ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"


def priced(service: InferenceService, observed: Observed, costs: Mapping[str, int]) -> list[Manifest]:
    """Engines' pods with the annotation that they lack, if the service is to have fewer; `costs` are by pod address."""
    deployment = observed.deployment(service, Component.ENGINE)
    if deployment is None or deployment["spec"].get("replicas", 0) <= service.spec.engine.replicas:
        return []
    return [
        _with_cost(pod, costs[address])
        for pod in observed.pods_of(Component.ENGINE)
        if (address := pod.get("status", {}).get("podIP")) in costs and _cost(pod) != str(costs[address])
    ]


def _cost(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"].get("annotations", {}).get(ANNOTATION, ""))


def _with_cost(pod: Manifest, cost: int) -> Manifest:
    # The uid: no other pod of the name is meant.
    metadata = {name: pod["metadata"][name] for name in ("name", "namespace", "uid")}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {**metadata, "annotations": {ANNOTATION: str(cost)}}}

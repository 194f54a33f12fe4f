"""PodDisruptionBudgets: a node that is drained takes one pod of a kind at a time."""

from __future__ import annotations

from quire.operator import names
from quire.operator.resources.metadata import LASTING, Component, Manifest, child_name, manifest, selector
from quire.operator.spec import InferenceService


def budgets(service: InferenceService) -> list[Manifest]:
    """One for each component but a canary. `maxUnavailable`: `minAvailable` would keep a lone pod's node for ever."""
    return [
        manifest(
            service,
            "policy/v1",
            "PodDisruptionBudget",
            child_name(service, component),
            component=component,
            spec={
                "maxUnavailable": 1,
                "selector": _selector(service, component),
                # Pods that never became ready serve nobody and may go.
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        )
        for component in LASTING
    ]


def _selector(service: InferenceService, component: Component) -> Manifest:
    if component is not Component.ENGINE or not service.spans_nodes:
        return {"matchLabels": selector(service, component)}
    # Whichever of its pods goes, an engine is gone.
    either = {"key": names.COMPONENT, "operator": "In", "values": [component.value, component.worker.value]}
    return {"matchLabels": {names.SERVICE: service.name}, "matchExpressions": [either]}

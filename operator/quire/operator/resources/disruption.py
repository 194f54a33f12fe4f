"""PodDisruptionBudgets: a node that is drained takes one pod of a kind at a time."""

from __future__ import annotations

from quire.operator.resources.metadata import LASTING, Manifest, child_name, manifest, selector
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
                "selector": {"matchLabels": selector(service, component)},
                # Pods that never became ready serve nobody and may go.
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        )
        for component in LASTING
    ]

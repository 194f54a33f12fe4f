"""How the pods of a Deployment are: how many there are, how many serve, whether they are the wanted ones."""

from __future__ import annotations

from dataclasses import dataclass

from quire.operator.resources.metadata import Manifest


@dataclass(frozen=True, slots=True)
class PodCounts:
    """`is_settled`: its pods are the wanted ones, in number and kind."""

    wanted: int
    total: int = 0
    available: int = 0
    is_settled: bool = False

    @classmethod
    def of(cls, deployment: Manifest | None, wanted: int) -> PodCounts:
        """Those of `deployment`, which should have `wanted` pods; none if it is not there."""
        if deployment is None:
            return cls(wanted)
        status = deployment.get("status", {})
        total, available = status.get("replicas", 0), status.get("availableReplicas", 0)
        is_current = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        is_settled = is_current and total == available == status.get("updatedReplicas", 0) == wanted
        return cls(wanted, total, available, is_settled)

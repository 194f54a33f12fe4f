"""How the pods of a component are: how many there are, how many serve, whether they are the wanted ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quire.operator.resources.group import KIND, template_hash
from quire.operator.resources.metadata import Manifest


@dataclass(frozen=True, slots=True)
class PodCounts:
    """`is_settled`: the pods are the wanted ones, in number and kind."""

    wanted: int
    total: int = 0
    available: int = 0
    is_settled: bool = False

    @classmethod
    def of(cls, workload: Manifest | None, wanted: int, pods: Iterable[Manifest] = ()) -> PodCounts:
        """Those of a Deployment or a LeaderWorkerSet, which should have `wanted`; none if it is not there.

        `pods` are its component's. A group counts as one, and is as its first pod is.
        """
        if workload is None:
            return cls(wanted)
        if workload["kind"] == KIND:
            return cls._of_groups(workload, wanted, pods)
        status = workload.get("status", {})
        total, available = status.get("replicas", 0), status.get("availableReplicas", 0)
        is_current = status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
        is_settled = is_current and total == available == status.get("updatedReplicas", 0) == wanted
        return cls(wanted, total, available, is_settled)

    @classmethod
    def _of_groups(cls, workload: Manifest, wanted: int, pods: Iterable[Manifest]) -> PodCounts:
        # No watch tells of its status, and old versions of its controller don't say which spec that is about.
        own = [pod for pod in pods if template_hash(pod)]
        ready = [pod for pod in own if is_ready(pod)]
        updated = [pod for pod in ready if template_hash(pod) == template_hash(workload)]
        return cls(wanted, len(own), len(ready), len(own) == len(updated) == wanted)

    def plus(self, other: PodCounts) -> PodCounts:
        """With those of what is being replaced: they may serve, too, and until they are gone nothing is settled."""
        return PodCounts(self.wanted, self.total + other.total, self.available + other.available)


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod takes requests."""
    conditions = pod.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

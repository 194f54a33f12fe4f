"""A LeaderWorkerSet: engines that span nodes, each a group of pods that live and die together.

The project's controller makes them (github.com/kubernetes-sigs/lws, its API version v1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.operator import names
from quire.operator.resources.metadata import Component, Manifest, child_name, digest, manifest
from quire.operator.resources.pods import rolling
from quire.operator.spec import InferenceService

KIND = "LeaderWorkerSet"


def leader_worker_set(
    service: InferenceService, component: Component, leader: Manifest, worker: Manifest, *, replicas: int, surge: int
) -> Manifest:
    """Groups of a pod made of `leader`, which serves, and further ones made of `worker`."""
    leader["metadata"]["annotations"][names.TEMPLATE_HASH] = digest([leader, worker])
    return manifest(
        service,
        "leaderworkerset.x-k8s.io/v1",
        KIND,
        child_name(service, component),
        component=component,
        spec={
            "replicas": replicas,
            # The Service by the set's own name would be the engines' own, in whose DNS no pod is before it is ready.
            "networkConfig": {"subdomainPolicy": "UniquePerReplica"},
            "rolloutStrategy": {"type": "RollingUpdate", "rollingUpdateConfiguration": rolling(surge)},
            # The first pod is ready only with the others.
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": service.spec.engine.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    )


def templates(workload: Mapping[str, Any]) -> list[Manifest]:
    """What the pods of a Deployment or a LeaderWorkerSet are made of, those that serve first."""
    spec = workload["spec"]
    if workload["kind"] != KIND:
        return [spec["template"]]
    return [spec["leaderWorkerTemplate"][name] for name in ("leaderTemplate", "workerTemplate")]


def template_hash(made: Mapping[str, Any]) -> str:
    """Which templates a LeaderWorkerSet has, or the first pod of a group was made of; empty for other things."""
    holder = templates(made)[0] if made["kind"] == KIND else made
    return str(holder["metadata"].get("annotations", {}).get(names.TEMPLATE_HASH, ""))

"""LeaderWorkerSet in a test's control plane: its CRD, and a stand-in for its controller, whose program is not at hand.

The CRD has the fields of version v1 that services use, and pods' own schemas in them, so the API server refuses what it
would refuse with the project's. The stand-in makes the same objects: a StatefulSet of first pods and one of further
pods for each of them, which Kubernetes' own controllers then run. It knows neither surge nor the restart of a group.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
from control_plane import Api, ApiError, until

from quire.operator.kinds import OPTIONAL, POD, Kind
from quire.operator.pod_counts import is_ready

Document = dict[str, Any]

(SET,) = (kind for kind in OPTIONAL if kind.name == "LeaderWorkerSet")
STATEFUL_SET = Kind("apps/v1", "StatefulSet", "statefulsets")
_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_LOOK_SECONDS = 0.2
_PREFIX = "leaderworkerset.sigs.k8s.io"


def install_leader_worker_sets(api: Api) -> None:
    """The kind, without anything that acts on it."""
    api.request("POST", _CRDS, crd())
    until("LeaderWorkerSets are served", lambda: is_served(api, SET))


def remove_leader_worker_sets(api: Api) -> None:
    """The kind and all of them."""
    with suppress(ApiError):
        api.request("DELETE", f"{_CRDS}/{crd()['metadata']['name']}")


@contextmanager
def leader_worker_controller(api: Api) -> Iterator[None]:
    """The stand-in acts until the block ends."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(_LOOK_SECONDS):
            for each in api.items(SET.everywhere):
                # Objects come and go between two requests.
                with suppress(ApiError):
                    _make(api, each)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _make(api: Api, wanted: Document) -> None:
    namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
    group = wanted["spec"]["leaderWorkerTemplate"]
    first = {f"{_PREFIX}/name": name, f"{_PREFIX}/worker-index": "0"}
    _apply(api, wanted, _stateful_set(name, namespace, wanted["spec"]["replicas"], first, group["leaderTemplate"]))
    leaders = api.items(POD.path(namespace), ",".join(f"{key}={value}" for key, value in first.items()))
    for leader in leaders:
        if not leader["metadata"].get("deletionTimestamp"):
            pod = leader["metadata"]["name"]
            further = {f"{_PREFIX}/name": name, f"{_PREFIX}/leader-name": pod}
            made = _stateful_set(pod, namespace, group["size"] - 1, further, group["workerTemplate"])
            made["spec"]["ordinals"] = {"start": 1}
            if api.get(STATEFUL_SET.path(namespace, pod)) is None:
                _apply(api, {**leader, "apiVersion": "v1", "kind": "Pod"}, made)
    ready = [each for each in leaders if is_ready(each)]
    status = {"replicas": len(leaders), "readyReplicas": len(ready), "updatedReplicas": len(ready)}
    if wanted.get("status") != status:
        api.patch(f"{SET.path(namespace, name)}/status", {"status": status})


def _stateful_set(name: str, namespace: str, replicas: int, labels: dict[str, str], template: Document) -> Document:
    metadata = {**template["metadata"], "labels": {**template["metadata"]["labels"], **labels}}
    return {
        "apiVersion": STATEFUL_SET.api_version, "kind": STATEFUL_SET.name,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "serviceName": name, "replicas": replicas, "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels}, "template": {**template, "metadata": metadata},
        },
    }  # fmt: skip


def _apply(api: Api, owner: Document, made: Document) -> None:
    made["metadata"]["ownerReferences"] = [
        {
            "apiVersion": owner.get("apiVersion", SET.api_version), "kind": owner.get("kind", SET.name),
            "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "controller": True,
            "blockOwnerDeletion": True,
        }
    ]  # fmt: skip
    path = STATEFUL_SET.path(made["metadata"]["namespace"], made["metadata"]["name"])
    api.apply(path, made, manager="stand-in")


def is_served(api: Api, kind: Kind) -> bool:
    """Whether objects of a kind can be made whose CRD has just been."""
    try:
        return api.get(kind.everywhere) is not None
    except ApiError as error:
        # It is being prepared.
        if error.status != 429:
            raise
        return False


def crd() -> Document:
    """The kind, with the fields that services use."""
    count, template = {"type": "integer", "minimum": 0}, _pod_template()
    number_or_share = {"x-kubernetes-int-or-string": True}
    rolling = {"maxSurge": number_or_share, "maxUnavailable": number_or_share, "partition": count}
    policies = ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
    group = {
        "size": {"type": "integer", "minimum": 1}, "restartPolicy": {"type": "string", "enum": policies},
        "leaderTemplate": template, "workerTemplate": template,
    }  # fmt: skip
    spec = {
        "replicas": count,
        "startupPolicy": {"type": "string", "enum": ["LeaderCreated", "LeaderReady"]},
        "networkConfig": _object({"subdomainPolicy": {"type": "string", "enum": ["Shared", "UniquePerReplica"]}}),
        "rolloutStrategy": _object(
            {"type": {"type": "string", "enum": ["RollingUpdate"]}, "rollingUpdateConfiguration": _object(rolling)}
        ),
        "leaderWorkerTemplate": _object(group),
    }
    status = {"replicas": count, "readyReplicas": count, "updatedReplicas": count, "hpaPodSelector": {"type": "string"}}
    scale = {"specReplicasPath": ".spec.replicas", "statusReplicasPath": ".status.replicas"}
    version = {
        "name": "v1", "served": True, "storage": True, "subresources": {"status": {}, "scale": scale},
        "schema": {"openAPIV3Schema": _object({"spec": _object(spec), "status": _object(status)})},
    }  # fmt: skip
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{SET.plural}.{SET.group}"},
        "spec": {
            "group": SET.group, "scope": "Namespaced", "versions": [version],
            "names": {"kind": SET.name, "plural": SET.plural, "singular": SET.name.lower()},
        },
    }  # fmt: skip


def _object(properties: Document) -> Document:
    return {"type": "object", "properties": properties}


def _pod_template() -> Document:
    """A pod template's schema as CRDs have it, from Kubernetes' own."""
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema/v1.36.0-local"
    schemas = json.loads((folder / "_definitions.json").read_text())["$defs"]

    def structural(node: Document) -> Document:
        if reference := node.get("$ref"):
            return structural(schemas[reference.rpartition("/")[2]])
        if "oneOf" in node:
            return {"x-kubernetes-int-or-string": True}
        kind = node["type"]
        found: Document = {"type": kind if isinstance(kind, str) else kind[0]}
        if "properties" in node:
            found["properties"] = {name: structural(each) for name, each in node["properties"].items()}
        for inner in ("items", "additionalProperties"):
            if isinstance(node.get(inner), dict):
                found[inner] = structural(node[inner])
        return found

    return structural(schemas["io.k8s.api.core.v1.PodTemplateSpec"])

"""What all pods have in common: who they are, what they may not do, where they spread, how they roll out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.operator import names
from quire.operator.resources.environment import environment, environment_name
from quire.operator.resources.metadata import Component, Manifest, child_name, digest, labels, manifest, selector
from quire.operator.spec import InferenceService
from quire.operator.spec_parts import ResourceSpec

# How long addresses of a pod that stops may still be in use: it goes on serving until they are forgotten.
_FORGOTTEN_SECONDS = 5
# Beyond what a process allows its requests, for its own end.
_SPARE_SECONDS = 15


def container(
    name: str,
    image: str,
    module: str,
    args: Sequence[str],
    service: InferenceService,
    *,
    resources: Manifest,
    mounts: Sequence[Manifest] = (),
    env: Sequence[Manifest] = (),
    **more: Any,
) -> Manifest:
    """A container that runs `python -m MODULE`, under the restricted Pod Security profile."""
    level = service.spec.observability.log_level
    built: Manifest = {
        "name": name,
        "image": image,
        "command": ["python", "-m", module],
        "args": [*args, f"--log-level={level}", "--log-format=json"],
        "envFrom": [{"configMapRef": {"name": environment_name(service)}}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}, *mounts],
        # The last lines of the log become the reason in the pod's status: a model that can't be loaded says why there.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        **more,
    }
    if env:
        built["env"] = list(env)
    if resources:
        built["resources"] = resources
    return built


def resources_of(spec: ResourceSpec, *, gpus: int = 0) -> Manifest:
    """A container's resources; amounts as strings, which the API server keeps as they are."""
    found = {
        which: {name: str(amount) for name, amount in amounts.items()}
        for which, amounts in (("requests", spec.requests), ("limits", spec.limits))
        if amounts
    }
    if gpus:
        found["limits"] = found.get("limits", {}) | {"nvidia.com/gpu": str(gpus)}
    return found


def own_name() -> Manifest:
    """The pod's name as POD_NAME, for `--name=$(POD_NAME)`."""
    return {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}


def linger() -> Manifest:
    """Keeps a pod that stops serving until nobody sends it anything new; the process then drains on SIGTERM."""
    return {"preStop": {"sleep": {"seconds": _FORGOTTEN_SECONDS}}}


def pod_template(
    service: InferenceService,
    component: Component,
    *,
    containers: Sequence[Manifest],
    drain_seconds: int,
    volumes: Sequence[Manifest] = (),
    init_containers: Sequence[Manifest] = (),
    **pod: Any,
) -> Manifest:
    """What the component's pods are made of; `pod` is what their spec has beside that."""
    pod_spec: Manifest = {
        "serviceAccountName": f"{service.name}-{component.field}",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _FORGOTTEN_SECONDS + drain_seconds + _SPARE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": names.USER,
            "runAsGroup": names.USER,
            "fsGroup": names.USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_spread(service, component),
        "containers": list(containers),
        "volumes": [{"name": "scratch", "emptyDir": {}}, *volumes],
        **pod,
    }
    if init_containers:
        pod_spec["initContainers"] = list(init_containers)
    if service.spec.image_pull_secrets:
        pod_spec["imagePullSecrets"] = [{"name": name} for name in service.spec.image_pull_secrets]
    metadata = {
        "labels": labels(service, component),
        "annotations": {names.CONFIG_HASH: digest(environment(service)["data"])},
    }
    return {"metadata": metadata, "spec": pod_spec}


def _spread(service: InferenceService, component: Component) -> Manifest:
    """Pods that serve lie apart, so that what takes one takes no other; a group's further pods lie near its first."""
    if component.leader is not component:
        return {"affinity": _near_its_group(service)}
    chosen = {"matchLabels": selector(service, component)}
    return {
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": chosen,
                "matchLabelKeys": ["pod-template-hash"],
            }
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ]
    }


def _near_its_group(service: InferenceService) -> Manifest:
    term = {
        "topologyKey": "topology.kubernetes.io/zone",
        "labelSelector": {"matchLabels": {names.SERVICE: service.name}},
        "matchLabelKeys": [names.GROUP_KEY],
    }
    preferred = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}


def rolling(surge: int) -> Manifest:
    """How many pods a rollout may add and take: new ones are ready before old ones drain, unless `surge` is 0."""
    return {"maxSurge": surge, "maxUnavailable": 0 if surge else 1}


def deployment(
    service: InferenceService, component: Component, template: Manifest, *, replicas: int, surge: int = 1
) -> Manifest:
    """The component's Deployment of pods made of `template`."""
    return manifest(
        service,
        "apps/v1",
        "Deployment",
        child_name(service, component),
        component=component,
        spec={
            "replicas": replicas,
            "revisionHistoryLimit": 3,
            # Routers and gateways are ready only with an engine, whose pod's own end tells more than a rollout's.
            "progressDeadlineSeconds": service.spec.engine.load_seconds + 60,
            "selector": {"matchLabels": selector(service, component)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling(surge)},
            "template": template,
        },
    )

"""What is wrong with a service, and what a person can do about it. Pure.

A pod's trouble is found where Kubernetes leaves it: in conditions and container states, which have one form for
"no GPU is free" and another for "no such image".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quire.operator import names
from quire.operator.kinds import CHILD_OF, OPTIONAL
from quire.operator.observed import Observed, Refusal
from quire.operator.resources import model
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.spec import InferenceService
from quire.operator.spec_parts import SecretKey

_LOG_CHARACTERS = 500

_PULL_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One trouble of one component. `reason` is for programs; `message` says what is wrong and what to do."""

    component: Component
    reason: str
    message: str
    is_about_model: bool = False


def problems(service: InferenceService, observed: Observed, refusals: Sequence[Refusal] = ()) -> list[Problem]:
    """Everything that is wrong, worst first, each trouble of a component once."""
    found: dict[tuple[Component, str], Problem] = {}
    for problem in (
        *_missing(service, observed),
        *(_refused(service, refusal) for refusal in refusals),
        *_of_deployments(service, observed),
        *(problem for pod in observed.pods for problem in _of_pod(service, pod)),
    ):
        found.setdefault((problem.component, problem.reason), problem)
    return list(found.values())


def _missing(service: InferenceService, observed: Observed) -> Iterator[Problem]:
    spec = service.spec
    hub, keys = spec.model.hub, spec.gateway.api_keys
    if hub and hub.token_secret:
        field = "spec.model.hub.tokenSecret"
        yield from _missing_entries(service, observed, Component.ENGINE, field, hub.token_secret, is_about_model=True)
    if keys:
        yield from _missing_entries(service, observed, Component.GATEWAY, "spec.gateway.apiKeys", keys)
    ingress = spec.gateway.ingress
    for field, name in (
        ("spec.gateway.tlsSecret", spec.gateway.tls_secret),
        ("spec.gateway.ingress.tlsSecret", ingress and ingress.tls_secret),
    ):
        for entry in ("tls.crt", "tls.key") if name else ():
            wanted = SecretKey(name=name or "", key=entry)
            yield from _missing_entries(service, observed, Component.GATEWAY, field, wanted)
    if spec.tls:
        for entry in ("tls.crt", "tls.key", "ca.crt"):
            wanted = SecretKey(name=spec.tls.secret, key=entry)
            yield from _missing_entries(service, observed, Component.ENGINE, "spec.tls.secret", wanted)
    for name in spec.image_pull_secrets:
        if name not in observed.secrets:
            yield _no_secret(service, Component.ENGINE, "spec.imagePullSecrets", name)
    claim = spec.model.claim
    if claim and claim.name not in observed.claims:
        yield Problem(
            Component.ENGINE,
            "ClaimMissing",
            f"spec.model.claim names the PersistentVolumeClaim {claim.name}, which is not in the namespace "
            f"{service.namespace}: create it there, or name another",
            is_about_model=True,
        )


def _missing_entries(
    service: InferenceService,
    observed: Observed,
    component: Component,
    field: str,
    wanted: SecretKey,
    *,
    is_about_model: bool = False,
) -> Iterator[Problem]:
    entries = observed.secrets.get(wanted.name)
    if entries is None:
        yield _no_secret(service, component, field, wanted.name, is_about_model=is_about_model)
    elif wanted.key not in entries:
        there = ", ".join(sorted(entries)) or "nothing"
        yield Problem(
            component,
            "SecretKeyMissing",
            f"{field} wants the entry {wanted.key} of the Secret {wanted.name}, which holds {there}: add the entry"
            + ("" if field.endswith(("tlsSecret", "tls.secret")) else f", or name another in {field}.key"),
            is_about_model,
        )


def _no_secret(
    service: InferenceService, component: Component, field: str, name: str, *, is_about_model: bool = False
) -> Problem:
    return Problem(
        component,
        "SecretMissing",
        f"{field} names the Secret {name}, which is not in the namespace {service.namespace}: create it there, "
        "or name another",
        is_about_model,
    )


def _refused(service: InferenceService, refusal: Refusal) -> Problem:
    component = next((each for each in Component if refusal.name == f"{service.name}-{each.value}"), None)
    if refusal.is_unknown:
        project, field = OPTIONAL[CHILD_OF[refusal.kind]]
        return Problem(
            component or Component.GATEWAY,
            "KindNotInstalled",
            f"the cluster knows no {refusal.kind}, which {field} asks for: install {project}, or leave {field} out",
        )
    return Problem(
        component.leader if component else Component.ENGINE,
        "ChildRefused",
        f"{refusal.kind} {refusal.name} was refused: {refusal.message}",
        is_about_model=refusal.kind == "PersistentVolumeClaim",
    )


def _of_deployments(service: InferenceService, observed: Observed) -> Iterator[Problem]:
    for component in Component:
        deployment = observed.deployment(service, component)
        for condition in (deployment or {}).get("status", {}).get("conditions", ()):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                yield Problem(
                    component,
                    "PodsRefused",
                    f"the cluster takes no pods of the {component.value}: {condition.get('message', '')}; change the "
                    f"quota or policy that it names, or spec.{component.field}.resources",
                )


def _of_pod(service: InferenceService, pod: Manifest) -> Iterator[Problem]:
    component = _component_of(pod)
    if component is None or pod["metadata"].get("deletionTimestamp"):
        return
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield _unschedulable(service, component, condition.get("message", ""))
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        problem = _of_container(service, component, pod, container)
        if problem:
            yield problem


def _component_of(pod: Manifest) -> Component | None:
    value = pod["metadata"].get("labels", {}).get(names.COMPONENT)
    return next((each.leader for each in Component if each.value == value), None)


def _unschedulable(service: InferenceService, component: Component, message: str) -> Problem:
    if "nvidia.com/gpu" in message:
        gpus = service.spec.engine.gpus
        free = "a free GPU" if gpus <= 1 else f"{gpus} free GPUs"
        return Problem(
            component,
            "InsufficientGPUs",
            f"no node has {free} for another engine ({message}): add a node with nvidia.com/gpu, lower "
            "spec.engine.replicas, or lower spec.engine.gpus (0 runs on the CPU)",
        )
    if "PersistentVolumeClaim" in message:
        claims = " and ".join(f"the claim {name}" for name in _claims(service)) or "a claim"
        return Problem(
            component,
            "ClaimUnbound",
            f"{claims} has no volume yet ({message}): check that its storage class exists and has room "
            "(kubectl describe pvc), or choose another in spec.model",
            is_about_model=True,
        )
    return Problem(
        component,
        "Unschedulable",
        f"no node takes a pod of the {component.value} ({message}): add a node, or change "
        f"spec.{component.field}.resources" + (", nodeSelector or tolerations" if component.field == "engine" else ""),
    )


def _claims(service: InferenceService) -> list[str]:
    spec = service.spec.model
    return [spec.claim.name] if spec.claim else [model.cache_name(service)] if spec.cache else []


def _of_container(
    service: InferenceService, component: Component, pod: Manifest, container: Manifest
) -> Problem | None:
    # Containers are called as the parts of the spec that they are made of.
    part, state = container["name"], container.get("state", {})
    waiting = state.get("waiting", {})
    reason, detail = waiting.get("reason", ""), waiting.get("message", "")
    if reason in _PULL_REASONS:
        return Problem(
            component,
            "ImagePullFailed",
            f"the image {container.get('image', '')} can't be pulled ({reason}{': ' if detail else ''}{detail}): check "
            f"spec.{part}.image, and spec.imagePullSecrets if it is private",
        )
    if reason in _CONFIG_REASONS:
        return Problem(component, "ContainerNotCreated", f"the {part}'s container can't be made: {detail or reason}")
    # A container that waits to be started again says in its last state why it ended.
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated") or {}
    if container.get("ready") or not ended or ended.get("exitCode") == 0:
        return None
    return _ended(component, part, pod, ended)


def _ended(component: Component, part: str, pod: Manifest, ended: Manifest) -> Problem:
    where = f"kubectl logs -n {pod['metadata']['namespace']} {pod['metadata']['name']} -c {part} --previous"
    log = ended.get("message", "").strip()[-_LOG_CHARACTERS:]
    if ended.get("reason") == "OOMKilled":
        return Problem(
            component,
            "OutOfMemory",
            f"the {part} was killed for taking more memory than its limit: raise spec.{part}.resources.limits.memory"
            + (", or lower spec.engine.kvCache or maxModelLen" if part == "engine" else ""),
            is_about_model=part == "engine",
        )
    if part == "engine" and ended.get("exitCode") == 2:
        # Exit status 2 of every service: what it was started with is wrong, which its last lines tell.
        return Problem(
            component,
            "ModelLoadFailed",
            f"the engine can't run the model: {log or f'see {where}'}",
            is_about_model=True,
        )
    return Problem(
        component,
        "Crashing",
        f"the {part} ended with status {ended.get('exitCode')}: {log or 'it left no message'}; see {where}",
    )

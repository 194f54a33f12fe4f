"""How containers come by the model: the flag that names it, the volume that holds it, the hub's token and cache."""

from __future__ import annotations

from quire.operator.resources.metadata import Manifest
from quire.operator.spec import InferenceService

EMBEDDED = "SmolLM2-135M-Instruct"

_MODEL = "/model"
_CACHE = "/cache"


def cache_name(service: InferenceService) -> str:
    """The claim that keeps the hub's downloads."""
    return f"{service.name}-model-cache"


def title(service: InferenceService) -> str:
    """The model as a person calls it."""
    model = service.spec.model
    if model.hub:
        return model.hub.name
    if model.claim:
        return f"pvc:{model.claim.name}/{model.claim.path}".rstrip("/")
    return model.image.reference if model.image else EMBEDDED


def flags(service: InferenceService) -> list[str]:
    """For every container that reads the model or its tokenizer; none is the model in the image."""
    model = service.spec.model
    if model.hub:
        at = f"@{model.hub.revision}" if model.hub.revision else ""
        return [f"--model={model.hub.name}{at}"]
    mounted = model.claim or model.image
    return [f"--model={_MODEL}/{mounted.path}".rstrip("/")] if mounted else []


def beside(path: str) -> str:
    """Where a container sees `path` of the volume that the model is on."""
    return f"{_MODEL}/{path}"


def volumes(service: InferenceService) -> list[Manifest]:
    """The pod's volumes."""
    model = service.spec.model
    if model.claim:
        return [{"name": "model", "persistentVolumeClaim": {"claimName": model.claim.name, "readOnly": True}}]
    if model.image:
        source = {"reference": model.image.reference, "pullPolicy": model.image.pull_policy}
        return [{"name": "model", "image": source}]
    if model.hub and model.cache:
        return [{"name": "model", "persistentVolumeClaim": {"claimName": cache_name(service)}}]
    return [{"name": "model", "emptyDir": {}}] if model.hub else []


def mounts(service: InferenceService) -> list[Manifest]:
    """Where a container sees them."""
    model = service.spec.model
    if model.hub:
        return [{"name": "model", "mountPath": _CACHE}]
    if model.claim or model.image:
        return [{"name": "model", "mountPath": _MODEL, "readOnly": True}]
    return []


def environment(service: InferenceService) -> list[Manifest]:
    """Where the hub's client keeps its files, and its token."""
    hub = service.spec.model.hub
    if hub is None:
        return []
    found: list[Manifest] = [{"name": "HF_HOME", "value": _CACHE}]
    if hub.token_secret:
        secret = {"name": hub.token_secret.name, "key": hub.token_secret.key}
        found.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}})
    return found


def kernel_cache(service: InferenceService) -> list[Manifest]:
    """Where a GPU's kernels stay once they are compiled: beside the hub's downloads, which may outlive the pod.

    Elsewhere it is the pod's own scratch folder.
    """
    if service.spec.model.hub is None or not service.spec.engine.gpus:
        return []
    return [{"name": "TRITON_CACHE_DIR", "value": f"{_CACHE}/triton"}]

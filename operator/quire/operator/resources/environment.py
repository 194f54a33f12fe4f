"""The ConfigMap with what all containers of a service are told alike: one place to read it."""

from __future__ import annotations

from quire.operator.resources.metadata import Manifest, manifest
from quire.operator.spec import InferenceService


def environment_name(service: InferenceService) -> str:
    """What the ConfigMap is called."""
    return f"{service.name}-environment"


def environment(service: InferenceService) -> Manifest:
    """The ConfigMap. Pod templates carry its hash, since a running process never sees its environment change."""
    data = {
        # The root file system is read-only; what libraries want to write goes to the pod's scratch volume.
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
    }
    if service.spec.observability.otlp_endpoint:
        data["OTEL_EXPORTER_OTLP_ENDPOINT"] = service.spec.observability.otlp_endpoint
        data["OTEL_RESOURCE_ATTRIBUTES"] = f"k8s.namespace.name={service.namespace},quire.service={service.name}"
    return manifest(service, "v1", "ConfigMap", environment_name(service), data=data)

"""The claim that keeps the hub's downloads."""

from __future__ import annotations

from quire.operator.resources import model
from quire.operator.resources.metadata import Manifest, manifest
from quire.operator.spec import InferenceService


def cache(service: InferenceService) -> list[Manifest]:
    """One claim for all pods of the service, if the service asks for a cache."""
    wanted = service.spec.model.cache
    if wanted is None:
        return []
    spec: Manifest = {"accessModes": [wanted.access_mode], "resources": {"requests": {"storage": wanted.size}}}
    if wanted.storage_class:
        spec["storageClassName"] = wanted.storage_class
    return [manifest(service, "v1", "PersistentVolumeClaim", model.cache_name(service), spec=spec)]

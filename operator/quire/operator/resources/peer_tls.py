"""TLS of the services among themselves: the Secret in their pods, and the flags that name its files."""

from __future__ import annotations

from quire.operator.resources.metadata import Manifest
from quire.operator.spec import InferenceService

_FOLDER = "/etc/quire/peers"
_PAIR = {"cert": f"{_FOLDER}/tls.crt", "key": f"{_FOLDER}/tls.key"}
_CA = f"{_FOLDER}/ca.crt"


def name(service: InferenceService) -> str:
    """Whom the certificate is for: engines are found by addresses that no certificate knows."""
    return f"{service.name}.{service.namespace}.svc"


def volumes(service: InferenceService) -> list[Manifest]:
    """The pod's volume."""
    return [{"name": "peers", "secret": {"secretName": service.spec.tls.secret}}] if service.spec.tls else []


def mounts(service: InferenceService) -> list[Manifest]:
    """Where a container sees it."""
    return [{"name": "peers", "mountPath": _FOLDER, "readOnly": True}] if service.spec.tls else []


def server_flags(service: InferenceService) -> list[str]:
    """Of a server that only those with a certificate may ask."""
    if service.spec.tls is None:
        return []
    return [f"--tls-client-ca={_CA}", *(f"--tls-{which}={file}" for which, file in _PAIR.items())]


def client_flags(service: InferenceService, prefix: str) -> list[str]:
    """Of a client of such servers; `prefix` is of its flags, such as --engine-tls."""
    if service.spec.tls is None:
        return []
    pair = (f"{prefix}-{which}={file}" for which, file in _PAIR.items())
    return [f"{prefix}-ca={_CA}", *pair, f"{prefix}-name={name(service)}"]

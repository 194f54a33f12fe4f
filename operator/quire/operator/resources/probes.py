"""Probes: the kubelet asks the servers' own health, over gRPC where there is one.

Kubelets don't speak gRPC over TLS: a command in the container does it for them.
"""

from __future__ import annotations

from quire.operator.resources import peer_tls
from quire.operator.resources.metadata import Manifest
from quire.operator.spec import InferenceService

_PERIOD = 5


def grpc(service: InferenceService, port: int, *, start_seconds: int) -> Manifest:
    """Startup, readiness and liveness of a gRPC server that serves once it can do its work.

    Liveness begins when startup has succeeded, so that loading a model for half an hour is no fault; it is slower to
    give up than readiness, which only takes the pod out of the Service.
    """
    # A process that asks has to start first, which takes a tenth of a second of a core, or longer if there is none.
    ask = {**_health(service, port), "periodSeconds": _PERIOD, "timeoutSeconds": 10 if service.spec.tls else 3}
    return {
        "startupProbe": {**ask, "failureThreshold": -(-start_seconds // _PERIOD)},
        "readinessProbe": {**ask, "failureThreshold": 1},
        "livenessProbe": {**ask, "periodSeconds": 10, "failureThreshold": 6},
    }


def _health(service: InferenceService, port: int) -> Manifest:
    if service.spec.tls is None:
        return {"grpc": {"port": port}}
    flags = peer_tls.client_flags(service, "--tls")
    return {"exec": {"command": ["python", "-m", "quire.service.health", f"localhost:{port}", *flags]}}


def split(service: InferenceService, port: int, *, live_port: int, start_seconds: int) -> Manifest:
    """Readiness over gRPC at `port`, startup and liveness by the metrics at `live_port`.

    For a server whose health tells of others too: a router without engines is not ready, and starting it again would
    bring none.
    """
    alive = http(live_port, ready="/metrics", live="/metrics", start_seconds=start_seconds)
    return {**alive, "readinessProbe": grpc(service, port, start_seconds=start_seconds)["readinessProbe"]}


def http(port: int, *, ready: str, live: str, start_seconds: int, scheme: str = "HTTP") -> Manifest:
    """The same over HTTP; `ready` and `live` are paths. A server that is up but must not get requests is alive."""

    def ask(path: str) -> Manifest:
        get = {"path": path, "port": port, "scheme": scheme}
        return {"httpGet": get, "periodSeconds": _PERIOD, "timeoutSeconds": 3}

    return {
        "startupProbe": {**ask(live), "failureThreshold": -(-start_seconds // _PERIOD)},
        "readinessProbe": {**ask(ready), "failureThreshold": 1},
        "livenessProbe": {**ask(live), "periodSeconds": 10, "failureThreshold": 6},
    }

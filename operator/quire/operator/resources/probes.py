"""Probes: the kubelet asks the servers' own health, over gRPC where there is one."""

from __future__ import annotations

from quire.operator.resources.metadata import Manifest

_PERIOD = 5


def grpc(port: int, *, start_seconds: int) -> Manifest:
    """Startup, readiness and liveness of a gRPC server that serves once it can do its work.

    Liveness begins when startup has succeeded, so that loading a model for half an hour is no fault; it is slower to
    give up than readiness, which only takes the pod out of the Service.
    """
    ask = {"grpc": {"port": port}, "periodSeconds": _PERIOD, "timeoutSeconds": 3}
    return {
        "startupProbe": {**ask, "failureThreshold": -(-start_seconds // _PERIOD)},
        "readinessProbe": {**ask, "failureThreshold": 1},
        "livenessProbe": {**ask, "periodSeconds": 10, "failureThreshold": 6},
    }


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

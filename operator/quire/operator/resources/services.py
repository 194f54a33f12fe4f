"""The Services: one address for clients, and headless ones towards routers and engines."""

from __future__ import annotations

from quire.operator import names
from quire.operator.resources.engine import CanaryEngines
from quire.operator.resources.metadata import Component, Manifest, child_name, manifest, selector
from quire.operator.spec import InferenceService


def url(service: InferenceService) -> str:
    """The OpenAI API as pods of the cluster reach it."""
    scheme = "https" if service.spec.gateway.tls_secret else "http"
    return f"{scheme}://{child_name(service, Component.GATEWAY)}.{service.namespace}.svc:{names.GATEWAY_HTTP}/v1"


_ENGINE_PORTS = {
    "grpc": names.ENGINE_GRPC,
    "metrics": names.ENGINE_METRICS,
    "grammar-metrics": names.SIDECAR_METRICS,
}


def services(service: InferenceService) -> list[Manifest]:
    """gRPC keeps a connection for days, so a virtual address would balance nothing: its clients see the pods."""
    headless: Manifest = {"clusterIP": "None"}
    return [
        _service(
            service,
            Component.GATEWAY,
            {"http": names.GATEWAY_HTTP, "grpc": names.GATEWAY_GRPC},
            type=service.spec.gateway.service_type,
        ),
        _service(
            service,
            Component.ROUTER,
            {"grpc": names.ROUTER_GRPC, "metrics": names.ROUTER_METRICS},
            # Gateways watch the routers' health themselves, and connect before the first engine is there.
            publishNotReadyAddresses=True,
            **headless,
        ),
        _service(
            service,
            Component.ENGINE,
            _ENGINE_PORTS,
            **headless,
        ),
    ]


def canary_service(engines: CanaryEngines) -> Manifest:
    """Where routers find the engines on trial, and how much to send them."""
    made = _service(engines.service, Component.CANARY, _ENGINE_PORTS, clusterIP="None")
    made["metadata"]["labels"] |= {**engines.labels, names.CANARY_PERCENT: str(engines.percent)}
    made["spec"]["selector"] |= engines.labels
    return made


def _service(service: InferenceService, component: Component, ports: dict[str, int], **spec: object) -> Manifest:
    return manifest(
        service,
        "v1",
        "Service",
        child_name(service, component),
        component=component,
        spec={
            **spec,
            "selector": selector(service, component),
            "ports": [
                {
                    "name": name, "port": port, "targetPort": name, "protocol": "TCP",
                    "appProtocol": _protocol(service, component, name),
                }
                for name, port in ports.items()
            ],
        },
    )  # fmt: skip


def _protocol(service: InferenceService, component: Component, port: str) -> str:
    if port != "grpc":
        return "http"
    return "https" if service.spec.tls and component is not Component.GATEWAY else "kubernetes.io/h2c"

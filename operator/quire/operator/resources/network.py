"""NetworkPolicies: who may connect to whom. Metrics are open to all, since scrapers live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from quire.operator import names
from quire.operator.resources.metadata import Component, Manifest, child_name, manifest, selector
from quire.operator.spec import InferenceService


def policies(service: InferenceService) -> list[Manifest]:
    """Clients reach gateways, gateways reach routers, routers reach engines, and nobody else does."""
    gateway = [_from_all([names.GATEWAY_HTTP, names.GATEWAY_GRPC])]
    router = [_from(service, Component.GATEWAY, names.ROUTER_GRPC), _from_all([names.ROUTER_METRICS])]
    return [
        _policy(service, Component.GATEWAY, gateway),
        _policy(service, Component.ROUTER, router),
        engine_policy(service, Component.ENGINE),
    ]


def engine_policy(service: InferenceService, component: Component) -> Manifest:
    """Of engines, on trial or not."""
    metrics = _from_all([names.ENGINE_METRICS, names.SIDECAR_METRICS])
    return _policy(service, component, [_from(service, Component.ROUTER, names.ENGINE_GRPC), metrics])


def _policy(service: InferenceService, component: Component, ingress: Sequence[Manifest]) -> Manifest:
    return manifest(
        service,
        "networking.k8s.io/v1",
        "NetworkPolicy",
        child_name(service, component),
        component=component,
        spec={
            "podSelector": {"matchLabels": selector(service, component)},
            "policyTypes": ["Ingress"],
            "ingress": list(ingress),
        },
    )


def _from(service: InferenceService, component: Component, port: int) -> Manifest:
    return {"from": [{"podSelector": {"matchLabels": selector(service, component)}}], **_from_all([port])}


def _from_all(ports: Sequence[int]) -> Manifest:
    return {"ports": [{"port": port, "protocol": "TCP"} for port in ports]}

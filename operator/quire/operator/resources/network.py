"""NetworkPolicies: who may connect to whom. Metrics are open to all, since scrapers live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from quire.operator import names
from quire.operator.resources.metadata import Component, Manifest, child_name, manifest, selector
from quire.operator.spec import InferenceService


def policies(service: InferenceService) -> list[Manifest]:
    """Clients reach gateways, gateways reach routers, routers reach engines, and nobody else does.

    The pods of an engine that spans nodes reach one another.
    """
    gateway = [_from_all([names.GATEWAY_HTTP, names.GATEWAY_GRPC])]
    router = [_from(service, Component.GATEWAY, names.ROUTER_GRPC), _from_all([names.ROUTER_METRICS])]
    return [
        _policy(service, Component.GATEWAY, gateway),
        _policy(service, Component.ROUTER, router),
        *engine_policies(service, Component.ENGINE),
    ]


def engine_policies(service: InferenceService, component: Component) -> list[Manifest]:
    """Of engines, on trial or not."""
    metrics = _from_all([names.ENGINE_METRICS, names.SIDECAR_METRICS])
    serving = [_from(service, Component.ROUTER, names.ENGINE_GRPC), metrics]
    if not service.spans_nodes:
        return [_policy(service, component, serving)]
    # On all ports: NCCL takes those that the kernel gives it.
    group = {"from": [_pods(service, each) for each in (component, component.worker)]}
    return [_policy(service, component, [*serving, group]), _policy(service, component.worker, [group])]


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
    return {"from": [_pods(service, component)], **_from_all([port])}


def _pods(service: InferenceService, component: Component) -> Manifest:
    return {"podSelector": {"matchLabels": selector(service, component)}}


def _from_all(ports: Sequence[int]) -> Manifest:
    return {"ports": [{"port": port, "protocol": "TCP"} for port in ports]}

"""Ways in from outside of the cluster: an Ingress, an HTTPRoute."""

from __future__ import annotations

from quire.operator import names
from quire.operator.exposure_spec import HttpRouteSpec, IngressSpec
from quire.operator.resources.metadata import Component, Manifest, child_name, manifest
from quire.operator.spec import InferenceService


def exposure(service: InferenceService) -> list[Manifest]:
    """Those that the service asks for."""
    spec = service.spec.gateway
    return [
        *([_ingress(service, spec.ingress)] if spec.ingress else []),
        *([_http_route(service, spec.http_route)] if spec.http_route else []),
    ]


def _ingress(service: InferenceService, wanted: IngressSpec) -> Manifest:
    name = child_name(service, Component.GATEWAY)
    backend = {"service": {"name": name, "port": {"name": "http"}}}
    spec: Manifest = {
        "rules": [{"host": wanted.host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}]
    }
    if wanted.class_name:
        spec["ingressClassName"] = wanted.class_name
    if wanted.tls_secret:
        spec["tls"] = [{"hosts": [wanted.host], "secretName": wanted.tls_secret}]
    made = manifest(service, "networking.k8s.io/v1", "Ingress", name, component=Component.GATEWAY, spec=spec)
    if wanted.annotations:
        made["metadata"]["annotations"] = dict(wanted.annotations)
    return made


def _http_route(service: InferenceService, wanted: HttpRouteSpec) -> Manifest:
    name = child_name(service, Component.GATEWAY)
    parents = []
    for each in wanted.gateways:
        parent = {"name": each.name, "namespace": each.namespace, "sectionName": each.section}
        parents.append({key: value for key, value in parent.items() if value is not None})
    spec: Manifest = {
        "parentRefs": parents,
        "rules": [
            {
                "backendRefs": [{"name": name, "port": names.GATEWAY_HTTP}],
                # Answers stream for as long as they take.
                "timeouts": {"request": "0s"},
            }
        ],
    }
    if wanted.hostnames:
        spec["hostnames"] = list(wanted.hostnames)
    return manifest(service, "gateway.networking.k8s.io/v1", "HTTPRoute", name, component=Component.GATEWAY, spec=spec)

"""The gateways' Deployment."""

from __future__ import annotations

from quire.operator import names
from quire.operator.config import Images
from quire.operator.resources import model, peer_tls, probes
from quire.operator.resources.metadata import Component, Manifest, child_name
from quire.operator.resources.pods import container, deployment, linger, pod_template, resources_of
from quire.operator.spec import InferenceService

_KEYS = "/etc/quire/keys"
_TLS = "/etc/quire/tls"


def gateway(service: InferenceService, images: Images) -> Manifest:
    """The Deployment. Keys and certificates are mounted as files, which the gateway reads anew when they change."""
    spec = service.spec.gateway
    routers = f"{child_name(service, Component.ROUTER)}.{service.namespace}.svc:{names.ROUTER_GRPC}"
    volumes, mounts, access = _access(service)
    scheme = "HTTPS" if spec.tls_secret else "HTTP"
    main = container(
        "gateway",
        spec.image or images.gateway,
        "quire.gateway",
        [
            f"--routers={routers}",
            "--host=0.0.0.0",
            f"--port={names.GATEWAY_HTTP}",
            f"--grpc-listen=[::]:{names.GATEWAY_GRPC}",
            f"--grace={spec.drain_seconds}",
            *model.flags(service),
            *(f"--served-model-name={name}" for name in service.spec.model.served_names),
            *([f"--max-model-len={service.spec.engine.max_model_len}"] if service.spec.engine.max_model_len else []),
            *access,
            *peer_tls.client_flags(service, "--router-tls"),
        ],
        service,
        resources=resources_of(spec.resources),
        mounts=[*mounts, *model.mounts(service), *peer_tls.mounts(service)],
        env=model.environment(service),
        ports=[
            {"name": "http", "containerPort": names.GATEWAY_HTTP},
            {"name": "grpc", "containerPort": names.GATEWAY_GRPC},
        ],
        lifecycle=linger(),
        **probes.http(names.GATEWAY_HTTP, ready="/ready", live="/health", start_seconds=300, scheme=scheme),
    )
    template = pod_template(
        service,
        Component.GATEWAY,
        containers=[main],
        volumes=[*volumes, *model.volumes(service), *peer_tls.volumes(service)],
        drain_seconds=spec.drain_seconds,
    )
    return deployment(service, Component.GATEWAY, template, replicas=spec.replicas)


def _access(service: InferenceService) -> tuple[list[Manifest], list[Manifest], list[str]]:
    """Volumes, mounts and flags of API keys and certificates."""
    spec = service.spec.gateway
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    flags: list[str] = []
    if spec.api_keys:
        items = [{"key": spec.api_keys.key, "path": "keys.jsonl"}]
        volumes.append({"name": "keys", "secret": {"secretName": spec.api_keys.name, "items": items}})
        mounts.append({"name": "keys", "mountPath": _KEYS, "readOnly": True})
        flags.append(f"--api-keys={_KEYS}/keys.jsonl")
    if spec.tls_secret:
        volumes.append({"name": "tls", "secret": {"secretName": spec.tls_secret}})
        mounts.append({"name": "tls", "mountPath": _TLS, "readOnly": True})
        flags += [f"--tls-cert={_TLS}/tls.crt", f"--tls-key={_TLS}/tls.key"]
    return volumes, mounts, flags

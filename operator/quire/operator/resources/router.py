"""The routers' Deployment."""

from __future__ import annotations

from quire.operator import names
from quire.operator.config import Images
from quire.operator.resources import peer_tls, probes
from quire.operator.resources.metadata import Component, Manifest, child_name
from quire.operator.resources.pods import container, deployment, linger, own_name, pod_template, resources_of
from quire.operator.spec import InferenceService


def router(service: InferenceService, images: Images) -> Manifest:
    """The Deployment. Routers find engines by the EndpointSlices of the engines' Service."""
    spec = service.spec.router
    # It drains as long as the gateways' answers and the engines' requests may take.
    drain = max(service.spec.gateway.drain_seconds, service.spec.engine.drain_seconds)
    kinds = [Component.ENGINE, *([Component.CANARY] if service.spec.rollout.canary else [])]
    engines = "+".join(child_name(service, each) for each in kinds)
    main = container(
        "router",
        spec.image or images.router,
        "quire.router",
        [
            f"--listen=[::]:{names.ROUTER_GRPC}",
            f"--engines=kubernetes:{service.namespace}/{engines}:grpc",
            "--name=$(POD_NAME)",
            f"--metrics-port={names.ROUTER_METRICS}",
            *_holding(service),
            f"--max-moves={spec.max_moves}",
            f"--grace={drain}",
            *peer_tls.server_flags(service),
            *peer_tls.client_flags(service, "--engine-tls"),
        ],
        service,
        resources=resources_of(spec.resources),
        mounts=peer_tls.mounts(service),
        env=[own_name()],
        ports=[
            {"name": "grpc", "containerPort": names.ROUTER_GRPC},
            {"name": "metrics", "containerPort": names.ROUTER_METRICS},
        ],
        lifecycle=linger(),
        **probes.split(service, names.ROUTER_GRPC, live_port=names.ROUTER_METRICS, start_seconds=60),
    )
    template = pod_template(
        service,
        Component.ROUTER,
        containers=[main],
        volumes=peer_tls.volumes(service),
        drain_seconds=drain,
        automountServiceAccountToken=True,
    )
    return deployment(service, Component.ROUTER, template, replicas=spec.replicas)


def _holding(service: InferenceService) -> list[str]:
    """How long requests wait for an engine. Without any the router takes them only if their waiting starts one."""
    seconds = service.spec.router.hold_seconds
    if not service.scales_to_zero:
        return [f"--hold={seconds}"]
    return [f"--hold={min(max(seconds, service.spec.engine.load_seconds), 3600)}", "--ready-without-engines"]

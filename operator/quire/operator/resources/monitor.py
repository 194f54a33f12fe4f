"""The PodMonitor: what tells a Prometheus operator's Prometheus to scrape the service's pods."""

from __future__ import annotations

from quire.operator import names
from quire.operator.resources.metadata import Manifest, manifest
from quire.operator.spec import InferenceService


def monitors(service: InferenceService) -> list[Manifest]:
    """One for all pods, if the service asks for it."""
    wanted = service.spec.observability.pod_monitor
    if wanted is None:
        return []
    interval = f"{wanted.interval_seconds}s"
    gateway: Manifest = {"port": "http", "path": "/metrics", "interval": interval}
    if service.spec.gateway.tls_secret:
        # The certificate is for clients' names, not for pods' addresses.
        gateway |= {"scheme": "https", "tlsConfig": {"insecureSkipVerify": True}}
    made = manifest(
        service,
        "monitoring.coreos.com/v1",
        "PodMonitor",
        service.name,
        spec={
            "selector": {"matchLabels": {names.MANAGED_BY: names.FIELD_MANAGER, names.SERVICE: service.name}},
            "podTargetLabels": [names.SERVICE, names.COMPONENT],
            "podMetricsEndpoints": [
                *({"port": port, "interval": interval} for port in ("metrics", "grammar-metrics")),
                gateway,
            ],
        },
    )
    made["metadata"]["labels"] = {**wanted.labels, **made["metadata"]["labels"]}
    return [made]

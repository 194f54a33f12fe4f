"""The grammar sidecar: a native sidecar container, so it starts before its engine and outlives its drain."""

from __future__ import annotations

from quire.operator import names
from quire.operator.config import Images
from quire.operator.resources import model, probes
from quire.operator.resources.metadata import Manifest
from quire.operator.resources.pods import container, resources_of
from quire.operator.spec import InferenceService

# Socket and masks lie in memory that both containers see; the engine makes its masks where shared memory is.
_SHARED = "/dev/shm"
ADDRESS = f"unix:{_SHARED}/sidecar.sock"
SHARED_VOLUME: Manifest = {"name": "shared", "emptyDir": {"medium": "Memory"}}
SHARED_MOUNT: Manifest = {"name": "shared", "mountPath": _SHARED}


def sidecar(service: InferenceService, images: Images) -> Manifest:
    """The container. Its health is on the socket, where no kubelet looks: its metrics tell that it is up."""
    spec = service.spec.sidecar
    checks = probes.http(names.SIDECAR_METRICS, ready="/metrics", live="/metrics", start_seconds=300)
    del checks["readinessProbe"]  # An engine without it still serves what has no grammar.
    return container(
        "sidecar",
        spec.image or images.sidecar,
        "quire.sidecar",
        [f"--listen={ADDRESS}", f"--metrics-port={names.SIDECAR_METRICS}", *model.flags(service)],
        service,
        resources=resources_of(spec.resources),
        mounts=[SHARED_MOUNT, *model.mounts(service)],
        env=model.environment(service),
        ports=[{"name": "grammar-metrics", "containerPort": names.SIDECAR_METRICS}],
        restartPolicy="Always",
        **checks,
    )

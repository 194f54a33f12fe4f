"""The engines' Deployment: an engine and its grammar sidecar in each pod."""

from __future__ import annotations

from dataclasses import dataclass

from quire.operator import names
from quire.operator.config import Images
from quire.operator.engine_spec import EngineSpec
from quire.operator.quantity import whole_bytes
from quire.operator.resources import model, probes, sidecar
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.resources.pods import container, deployment, linger, own_name, resources_of
from quire.operator.revision import Revision
from quire.operator.spec import InferenceService


@dataclass(frozen=True, slots=True)
class CanaryEngines:
    """Engines that `service` asks for, beside those that there were: `percent` of the requests go to `replicas`."""

    service: InferenceService
    revision: str
    replicas: int
    percent: int

    @property
    def labels(self) -> dict[str, str]:
        """What tells their pods from those of a canary before."""
        return {names.REVISION: self.revision}


def engine(service: InferenceService, images: Images) -> Manifest:
    """The Deployment. A pod counts as started once the model is loaded, and drains on SIGTERM."""
    made = _deployment(service, images, Component.ENGINE, service.spec.engine.replicas)
    made["metadata"]["annotations"] = {names.MADE_OF: Revision.of(service).text}
    return made


def canary(engines: CanaryEngines, images: Images) -> Manifest:
    """The Deployment of those on trial."""
    made = _deployment(engines.service, images, Component.CANARY, engines.replicas)
    for metadata in (made["metadata"], made["spec"]["template"]["metadata"]):
        metadata["labels"] |= engines.labels
    return made


def _deployment(service: InferenceService, images: Images, component: Component, replicas: int) -> Manifest:
    spec = service.spec.engine
    main = container(
        "engine",
        spec.image or images.engine,
        "quire.engine",
        [
            f"--listen=[::]:{names.ENGINE_GRPC}",
            "--name=$(POD_NAME)",
            f"--sidecar={sidecar.ADDRESS}",
            f"--metrics-port={names.ENGINE_METRICS}",
            f"--grace={spec.drain_seconds}",
            *model.flags(service),
            *_flags(spec),
            *spec.extra_args,
        ],
        service,
        resources=resources_of(spec.resources, gpus=spec.gpus),
        mounts=[sidecar.SHARED_MOUNT, *model.mounts(service)],
        env=[own_name(), *model.environment(service)],
        ports=[
            {"name": "grpc", "containerPort": names.ENGINE_GRPC},
            {"name": "metrics", "containerPort": names.ENGINE_METRICS},
        ],
        lifecycle=linger(),
        **probes.grpc(names.ENGINE_GRPC, start_seconds=spec.load_seconds),
    )
    placement: Manifest = {}
    if spec.node_selector:
        placement["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        placement["tolerations"] = [
            {key: value for key, value in (
                ("key", each.key), ("operator", each.operator), ("value", each.value), ("effect", each.effect),
            ) if value is not None}
            for each in spec.tolerations
        ]  # fmt: skip
    return deployment(
        service,
        component,
        replicas=replicas,
        containers=[main],
        init_containers=[sidecar.sidecar(service, images)],
        volumes=[sidecar.SHARED_VOLUME, *model.volumes(service)],
        drain_seconds=spec.drain_seconds,
        surge=spec.surge,
        **placement,
    )


def _flags(spec: EngineSpec) -> list[str]:
    found = [f"--dtype={spec.dtype}"]
    if spec.gpus:
        # An engine that can't use the GPU it has must not run on the CPU instead.
        found.append("--device=cuda")
    if spec.max_model_len is not None:
        found.append(f"--max-model-len={spec.max_model_len}")
    if spec.kv_cache is not None:
        found.append(f"--kv-cache-bytes={whole_bytes(spec.kv_cache)}")
    if spec.max_num_seqs is not None:
        found.append(f"--max-num-seqs={spec.max_num_seqs}")
    return found

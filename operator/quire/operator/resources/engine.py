"""The engines' Deployment: an engine and its grammar sidecar in each pod."""

from __future__ import annotations

from quire.operator import names
from quire.operator.config import Images
from quire.operator.engine_spec import EngineSpec
from quire.operator.quantity import whole_bytes
from quire.operator.resources import model, probes, sidecar
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.resources.pods import container, deployment, linger, own_name, resources_of
from quire.operator.spec import InferenceService


def engine(service: InferenceService, images: Images) -> Manifest:
    """The Deployment. A pod counts as started once the model is loaded, and drains on SIGTERM."""
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
        Component.ENGINE,
        replicas=spec.replicas,
        containers=[main],
        init_containers=[sidecar.sidecar(service, images)],
        volumes=[sidecar.SHARED_VOLUME, *model.volumes(service)],
        drain_seconds=spec.drain_seconds,
        surge=spec.surge,
        **placement,
    )


def _flags(spec: EngineSpec) -> list[str]:
    found = [f"--dtype={spec.dtype}"]
    if spec.max_model_len is not None:
        found.append(f"--max-model-len={spec.max_model_len}")
    if spec.kv_cache is not None:
        found.append(f"--kv-cache-bytes={whole_bytes(spec.kv_cache)}")
    if spec.max_num_seqs is not None:
        found.append(f"--max-num-seqs={spec.max_num_seqs}")
    return found

"""The engines: one and its grammar sidecar in each pod, or in the first pod of each group where they span nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.operator import names
from quire.operator.config import Images
from quire.operator.engine_spec import EngineSpec
from quire.operator.quantity import whole_bytes
from quire.operator.resources import model, peer_tls, probes, sidecar
from quire.operator.resources.group import leader_worker_set, templates
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.resources.pods import container, deployment, linger, own_name, pod_template, resources_of
from quire.operator.revision import Revision
from quire.operator.spec import InferenceService
from quire.operator.speculation_spec import SpeculationSpec


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
    """A Deployment or a LeaderWorkerSet. A pod counts as started once the model is loaded, and drains on SIGTERM."""
    made = _workload(service, images, Component.ENGINE, service.spec.engine.replicas)
    made["metadata"]["annotations"] = {names.MADE_OF: Revision.of(service).text}
    return made


def canary(engines: CanaryEngines, images: Images) -> Manifest:
    """The same of those on trial."""
    made = _workload(engines.service, images, Component.CANARY, engines.replicas)
    for metadata in (made["metadata"], *(each["metadata"] for each in templates(made))):
        metadata["labels"] |= engines.labels
    return made


def _workload(service: InferenceService, images: Images, component: Component, replicas: int) -> Manifest:
    surge, serving = service.spec.engine.surge, _serving(service, images, component)
    if not service.spans_nodes:
        return deployment(service, component, serving, replicas=replicas, surge=surge)
    # An engine's further pods have neither port nor sidecar.
    worker = _template(service, component.worker, _container(service, images))
    return leader_worker_set(service, component, serving, worker, replicas=replicas, surge=surge)


def _serving(service: InferenceService, images: Images, component: Component) -> Manifest:
    """What pods that routers connect to are made of."""
    main = _container(
        service,
        images,
        flags=[
            f"--listen=[::]:{names.ENGINE_GRPC}",
            f"--sidecar={sidecar.ADDRESS}",
            f"--metrics-port={names.ENGINE_METRICS}",
            *peer_tls.server_flags(service),
        ],
        mounts=peer_tls.mounts(service),
        ports=[
            {"name": "grpc", "containerPort": names.ENGINE_GRPC},
            {"name": "metrics", "containerPort": names.ENGINE_METRICS},
        ],
        lifecycle=linger(),
        # Of all of an engine's pods: it is ready once every one has loaded its share, and ends when one of them does.
        **probes.grpc(service, names.ENGINE_GRPC, start_seconds=service.spec.engine.load_seconds),
    )
    volumes = peer_tls.volumes(service)
    return _template(service, component, main, volumes=volumes, init_containers=[sidecar.sidecar(service, images)])


def _container(
    service: InferenceService,
    images: Images,
    *,
    flags: Sequence[str] = (),
    mounts: Sequence[Manifest] = (),
    **more: Any,
) -> Manifest:
    spec = service.spec.engine
    return container(
        "engine",
        spec.image or images.engine,
        "quire.engine",
        [
            *flags,
            "--name=$(POD_NAME)",
            f"--grace={spec.drain_seconds}",
            *model.flags(service),
            *_flags(spec),
            *spec.extra_args,
        ],
        service,
        resources=resources_of(spec.resources, gpus=spec.gpus),
        # Shared with the sidecar, and between the processes of several GPUs.
        mounts=[sidecar.SHARED_MOUNT, *model.mounts(service), *mounts],
        env=[own_name(), *model.environment(service), *model.kernel_cache(service)],
        **more,
    )


def _template(
    service: InferenceService,
    component: Component,
    main: Manifest,
    *,
    volumes: Sequence[Manifest] = (),
    init_containers: Sequence[Manifest] = (),
) -> Manifest:
    spec = service.spec.engine
    return pod_template(
        service,
        component,
        containers=[main],
        init_containers=init_containers,
        volumes=[sidecar.SHARED_VOLUME, *model.volumes(service), *volumes],
        drain_seconds=spec.drain_seconds,
        **_placement(spec),
    )


def _placement(spec: EngineSpec) -> Manifest:
    found: Manifest = {}
    if spec.node_selector:
        found["nodeSelector"] = dict(spec.node_selector)
    if spec.tolerations:
        found["tolerations"] = [
            {key: value for key, value in (
                ("key", each.key), ("operator", each.operator), ("value", each.value), ("effect", each.effect),
            ) if value is not None}
            for each in spec.tolerations
        ]  # fmt: skip
    return found


def _flags(spec: EngineSpec) -> list[str]:
    found = [f"--dtype={spec.dtype}"]
    if spec.gpus:
        # An engine that can't use the GPU it has must not run on the CPU instead.
        found.append("--device=cuda")
    if spec.gpus * spec.nodes > 1:
        found.append(f"--tensor-parallel-size={spec.gpus * spec.nodes}")
    if spec.nodes > 1:
        found += [
            f"--nnodes={spec.nodes}",
            f"--node-rank=$({names.WORKER_INDEX})",
            f"--master-addr=$({names.LEADER_ADDRESS})",
            f"--master-port={names.ENGINE_RENDEZVOUS}",
            f"--rendezvous-timeout={spec.load_seconds}",
        ]
    if spec.max_model_len is not None:
        found.append(f"--max-model-len={spec.max_model_len}")
    if spec.kv_cache is not None:
        found.append(f"--kv-cache-bytes={whole_bytes(spec.kv_cache)}")
    if spec.kv_dtype != "auto":
        found.append(f"--kv-cache-dtype={spec.kv_dtype}")
    if spec.max_num_seqs is not None:
        found.append(f"--max-num-seqs={spec.max_num_seqs}")
    return found + _draft_flags(spec.speculation)


def _draft_flags(spec: SpeculationSpec) -> list[str]:
    found = []
    if not spec.enabled:
        found.append("--speculation=off")
    if spec.tokens != SpeculationSpec().tokens:
        found.append(f"--num-speculative-tokens={spec.tokens}")
    if spec.head is not None:
        found.append(f"--speculative-model={model.beside(spec.head)}")
    return found

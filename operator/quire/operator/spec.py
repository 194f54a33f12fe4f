"""The resource, InferenceService: the one source of its CRD (`crd`), of its defaults and of its rules.

Read by `core` and `resources`; `parse` is how a document becomes these types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, field

from quire.operator.rules import Rule, Spec, each_matches, matches
from quire.service.errors import ConfigError

_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
# From a mebibyte on: no engine starts with less.
_MEMORY = r"[1-9][0-9]*(\.[0-9]+)?(G|T|Mi|Gi|Ti)"
_RELATIVE_PATH = r"([^/.][^/]*|\.[^/.][^/]*)(/([^/.][^/]*|\.[^/.][^/]*))*/?"
# A registry host, a path, and a tag or a digest.
_IMAGE = r"[a-zA-Z0-9][-a-zA-Z0-9.:]*(/[a-z0-9][-._a-z0-9]*)*(:[\w][-.\w]*)?(@sha256:[0-9a-f]{64})?"

_NAME_ADVICE = "lower-case letters, digits, '-' and '.', such as my-name"
_IMAGE_ADVICE = "write an image as REGISTRY/PATH:TAG or REGISTRY/PATH@sha256:DIGEST"

Resources = Annotated[
    dict[str, int | Annotated[str, Meta(max_length=32)]],
    Meta(description="Quantities by resource name, such as cpu: 4 and memory: 16Gi.", max_length=8),
]


def _quantities(on: str) -> Rule:
    pattern = _QUANTITY.replace("\\", "\\\\")
    compiled = matches("", _QUANTITY, "").holds
    return Rule(
        f"self.all(name, type(self[name]) == int ? self[name] >= 0 : string(self[name]).matches('^{pattern}$'))",
        f"{on} needs quantities: write a number with an optional unit, such as 2, 500m, 16Gi",
        lambda values: all(value >= 0 if isinstance(value, int) else compiled(value) for value in values.values()),
        on,
    )


class ResourceSpec(Spec, frozen=True):
    """What a container asks for and may take."""

    requests: Resources = field(default_factory=dict)
    limits: Resources = field(default_factory=dict)

    rules = (_quantities("requests"), _quantities("limits"))


class SecretKey(Spec, frozen=True):
    """One entry of a Secret in the service's namespace."""

    name: Annotated[str, Meta(description="The Secret.", min_length=1, max_length=253)]
    key: Annotated[str, Meta(description="The entry in it.", min_length=1, max_length=253)] = "token"

    rules = (
        matches("name", _NAME, f"name is not a Secret's name: use {_NAME_ADVICE}"),
        matches("key", r"[-._a-zA-Z0-9]+", "key is not an entry's name: use letters, digits, '-', '_' and '.'"),
    )


class HubModel(Spec, frozen=True):
    """A model on the Hugging Face hub. Every pod downloads it, into the cache if there is one."""

    name: Annotated[str, Meta(description="Its name on the hub, as OWNER/NAME.", min_length=3, max_length=200)]
    token_secret: Annotated[SecretKey | None, Meta(description="The hub's token, for private and gated models.")] = None

    rules = (
        matches("name", r"\w[\w.-]*/\w[\w.-]*", "name is not a hub name: write OWNER/NAME, such as Qwen/Qwen3-8B"),
    )


class ClaimModel(Spec, frozen=True):
    """A model on a PersistentVolumeClaim in the service's namespace. It is mounted read-only in all pods."""

    name: Annotated[str, Meta(description="The claim.", min_length=1, max_length=253)]
    path: Annotated[
        str,
        Meta(description="Folder or .gguf file on the volume; empty is the volume itself.", max_length=1024),
    ] = ""

    rules = (
        matches("name", _NAME, f"name is not a claim's name: use {_NAME_ADVICE}"),
        matches("path", f"({_RELATIVE_PATH})?", "path leaves the volume: write it relative and without '..'"),
    )


class ImageModel(Spec, frozen=True):
    """A model in an OCI image, mounted as a volume in all pods (Kubernetes 1.35 or newer)."""

    reference: Annotated[str, Meta(description="The image.", min_length=1, max_length=512)]
    path: Annotated[
        str, Meta(description="Folder or .gguf file in the image; empty is the image's root.", max_length=1024)
    ] = ""
    pull_policy: Annotated[
        Literal["Always", "IfNotPresent", "Never"], Meta(description="When nodes pull the image.")
    ] = "IfNotPresent"

    rules = (
        matches("reference", _IMAGE, f"reference is not an image: {_IMAGE_ADVICE}"),
        matches("path", f"({_RELATIVE_PATH})?", "path leaves the image: write it relative and without '..'"),
    )


class ModelCache(Spec, frozen=True):
    """A claim that the operator makes for the hub's downloads and deletes with the service."""

    size: Annotated[str, Meta(description="Room for the model's files, such as 50Gi.", max_length=32)]
    storage_class: Annotated[
        Annotated[str, Meta(min_length=1, max_length=253)] | None,
        Meta(description="Left out, the cluster's default class."),
    ] = None
    access_mode: Annotated[
        Literal["ReadWriteMany", "ReadWriteOnce"],
        Meta(description="ReadWriteOnce only where all pods run on one node."),
    ] = "ReadWriteMany"

    rules = (
        matches("size", _QUANTITY, "size is not a quantity: write a number with a unit, such as 50Gi"),
        matches("storage_class", _NAME, f"storageClass is not a class's name: use {_NAME_ADVICE}"),
    )


class ModelSpec(Spec, frozen=True):
    """Where the model comes from: one of hub, claim and image; none of them is the model that the images carry."""

    hub: Annotated[HubModel | None, Meta(description="A model on the Hugging Face hub.")] = None
    claim: Annotated[ClaimModel | None, Meta(description="A model on a PersistentVolumeClaim.")] = None
    image: Annotated[ImageModel | None, Meta(description="A model in an OCI image.")] = None
    cache: Annotated[
        ModelCache | None, Meta(description="Keeps the hub's downloads; without it each pod downloads anew.")
    ] = None
    served_names: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...],
        Meta(description="What the API calls the model; empty is the checkpoint's own name.", max_length=16),
    ] = ()

    rules = (
        Rule(
            "[has(self.hub), has(self.claim), has(self.image)].filter(given, given).size() <= 1",
            "model has several sources: keep one of hub, claim and image",
            lambda model: sum(each is not None for each in (model.hub, model.claim, model.image)) <= 1,
        ),
        Rule(
            "!has(self.cache) || has(self.hub)",
            "model.cache keeps what is downloaded: give model.hub with it, or leave it out",
            lambda model: model.cache is None or model.hub is not None,
        ),
        each_matches(
            "served_names",
            r"[\w][-\w./:]*",
            "servedNames holds a bad name: use letters, digits, '-', '_', '.', '/', ':'",
        ),
    )


_OWN_FLAGS = ("listen", "name", "model", "sidecar", "metrics-port", "grace", "log-level", "log-format")
_FIELD_FLAGS = ("max-model-len", "dtype", "kv-cache-bytes", "max-num-seqs")
_TAKEN = f"--({'|'.join((*_OWN_FLAGS, *_FIELD_FLAGS))})(=.*)?"


class Toleration(Spec, frozen=True):
    """A taint of nodes that pods put up with, as in a pod."""

    key: Annotated[
        Annotated[str, Meta(max_length=316)] | None, Meta(description="The taint's key; left out, all keys.")
    ] = None
    operator: Annotated[Literal["Exists", "Equal"], Meta(description="How value is compared.")] = "Equal"
    value: Annotated[Annotated[str, Meta(max_length=63)] | None, Meta(description="The taint's value.")] = None
    effect: Annotated[
        Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None,
        Meta(description="The taint's effect; left out, all effects."),
    ] = None

    rules = (
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            "a toleration with operator Exists has no value: leave it out, or write operator: Equal",
            lambda toleration: toleration.operator != "Exists" or toleration.value is None,
        ),
        Rule(
            "self.operator == 'Exists' || has(self.key)",
            "a toleration without key needs operator: Exists",
            lambda toleration: toleration.operator == "Exists" or toleration.key is not None,
        ),
    )


class EngineSpec(Spec, frozen=True):
    """The pods that run the model, each with a grammar sidecar."""

    replicas: Annotated[
        int, Meta(description="How many. The scale subresource (kubectl scale) writes it.", ge=0, le=1000)
    ] = 1
    image: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="Left out, the operator's own.")
    ] = None
    gpus: Annotated[int, Meta(description="NVIDIA GPUs of each engine; 0 runs on the CPU.", ge=0, le=1)] = 0
    resources: Annotated[ResourceSpec, Meta(description="Of the engine's container, GPUs aside.")] = field(
        default_factory=ResourceSpec
    )
    max_model_len: Annotated[
        Annotated[int, Meta(ge=16, le=1 << 24)] | None,
        Meta(description="Prompt and output together, in tokens; left out, the model's own."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Meta(description="What it computes in; float32 is exact.")
    ] = "auto"
    kv_cache: Annotated[
        Annotated[str, Meta(max_length=32)] | None,
        Meta(description="Memory for keys and values, such as 8Gi; left out, the engine's default."),
    ] = None
    max_num_seqs: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        Meta(description="Sequences in a batch; left out, the engine's default."),
    ] = None
    extra_args: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=512)], ...],
        Meta(description="Further flags of `python -m quire.engine`, one FLAG=VALUE an entry.", max_length=32),
    ] = ()
    surge: Annotated[
        int,
        Meta(
            description="Engines that a rollout may add before old ones drain; 0 where no GPU is spare: then one "
            "engine at a time goes before its successor comes.",
            ge=0,
            le=100,
        ),
    ] = 1
    load_seconds: Annotated[
        int,
        Meta(description="How long the model may take to get and load; then the pod is restarted.", ge=10, le=86400),
    ] = 1800
    drain_seconds: Annotated[
        int, Meta(description="How long requests in flight may go on when an engine stops.", ge=0, le=3600)
    ] = 30
    node_selector: Annotated[
        dict[str, Annotated[str, Meta(max_length=63)]],
        Meta(description="Labels of the nodes that engines run on.", max_length=16),
    ] = field(default_factory=dict)
    tolerations: Annotated[
        tuple[Toleration, ...], Meta(description="Taints of nodes that engines put up with.", max_length=16)
    ] = ()

    rules = (
        matches("image", _IMAGE, f"image is not an image: {_IMAGE_ADVICE}"),
        matches(
            "kv_cache", _MEMORY, "kvCache is not an amount of memory: write a number with Mi, Gi or Ti, such as 8Gi"
        ),
        Rule(
            "self.all(flag, flag.startsWith('--'))",
            "extraArgs holds an entry that is no flag: write FLAG=VALUE in one entry, such as --max-waiting=64",
            lambda flags: all(flag.startswith("--") for flag in flags),
            "extra_args",
        ),
        Rule(
            f"!self.exists(flag, flag.matches('^{_TAKEN}$'))",
            "extraArgs sets a flag that the operator sets: use maxModelLen, dtype, kvCache or maxNumSeqs for those, "
            "and leave out --listen, --name, --model, --sidecar, --metrics-port, --grace and the log's",
            lambda flags: not any(matches("", _TAKEN, "").holds(flag) for flag in flags),
            "extra_args",
        ),
        Rule(
            "[has(self.limits) ? self.limits : {}, has(self.requests) ? self.requests : {}]"
            ".all(amounts, !('nvidia.com/gpu' in amounts))",
            "resources asks for nvidia.com/gpu: set engine.gpus instead",
            lambda resources: "nvidia.com/gpu" not in {**resources.limits, **resources.requests},
            "resources",
        ),
    )


class SidecarSpec(Spec, frozen=True):
    """The container beside each engine that turns grammars into token masks."""

    image: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="Left out, the operator's own.")
    ] = None
    resources: Annotated[ResourceSpec, Meta(description="Of the sidecar's container.")] = field(
        default_factory=ResourceSpec
    )

    rules = (matches("image", _IMAGE, f"image is not an image: {_IMAGE_ADVICE}"),)


class RouterSpec(Spec, frozen=True):
    """The pods that pick an engine for each request."""

    replicas: Annotated[int, Meta(description="How many.", ge=1, le=100)] = 1
    image: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="Left out, the operator's own.")
    ] = None
    resources: Annotated[ResourceSpec, Meta(description="Of the router's container.")] = field(
        default_factory=ResourceSpec
    )
    hold_seconds: Annotated[
        int, Meta(description="How long a request waits for an engine when none is ready.", ge=0, le=3600)
    ] = 5
    max_moves: Annotated[
        int,
        Meta(description="How often a request may move to another engine without a token in between.", ge=0, le=100),
    ] = 3

    rules = (matches("image", _IMAGE, f"image is not an image: {_IMAGE_ADVICE}"),)


class GatewaySpec(Spec, frozen=True):
    """The pods that serve the OpenAI API and the public gRPC service."""

    replicas: Annotated[int, Meta(description="How many.", ge=1, le=100)] = 1
    image: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="Left out, the operator's own.")
    ] = None
    resources: Annotated[ResourceSpec, Meta(description="Of the gateway's container.")] = field(
        default_factory=ResourceSpec
    )
    api_keys: Annotated[
        SecretKey | None,
        Meta(description="A file of `quire keys`; left out, everybody who reaches the gateway may ask."),
    ] = None
    tls_secret: Annotated[
        Annotated[str, Meta(min_length=1, max_length=253)] | None,
        Meta(
            description="A Secret with tls.crt and tls.key; left out, HTTP and gRPC are plain.",
        ),
    ] = None
    service_type: Annotated[
        Literal["ClusterIP", "NodePort", "LoadBalancer"], Meta(description="How the Service is reached.")
    ] = "ClusterIP"
    drain_seconds: Annotated[
        int, Meta(description="How long answers in flight may go on when a gateway stops.", ge=0, le=3600)
    ] = 30

    rules = (
        matches("image", _IMAGE, f"image is not an image: {_IMAGE_ADVICE}"),
        matches("tls_secret", _NAME, f"tlsSecret is not a Secret's name: use {_NAME_ADVICE}"),
    )


class ObservabilitySpec(Spec, frozen=True):
    """What the service tells about itself. Every container serves Prometheus metrics in any case."""

    otlp_endpoint: Annotated[
        Annotated[str, Meta(max_length=512)] | None,
        Meta(description="Where spans go over OTLP, such as http://collector:4317; left out, nowhere."),
    ] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Of all containers.")] = "info"

    rules = (
        matches(
            "otlp_endpoint", r"https?://[^\s/]+(/\S*)?",
            "otlpEndpoint is not an address: write http://HOST:PORT or https://HOST:PORT",
        ),
    )  # fmt: skip


class InferenceServiceSpec(Spec, frozen=True):
    """What should be served, and by how much."""

    model: Annotated[ModelSpec, Meta(description="What is served.")] = field(default_factory=ModelSpec)
    engine: Annotated[EngineSpec, Meta(description="The pods that run the model.")] = field(default_factory=EngineSpec)
    sidecar: Annotated[SidecarSpec, Meta(description="The grammar service in each engine's pod.")] = field(
        default_factory=SidecarSpec
    )
    router: Annotated[RouterSpec, Meta(description="The pods that pick engines.")] = field(default_factory=RouterSpec)
    gateway: Annotated[GatewaySpec, Meta(description="The pods that serve the API.")] = field(
        default_factory=GatewaySpec
    )
    observability: Annotated[ObservabilitySpec, Meta(description="Traces and logs.")] = field(
        default_factory=ObservabilitySpec
    )
    image_pull_secrets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=253)], ...],
        Meta(description="Secrets with which nodes pull the images.", max_length=8),
    ] = ()

    rules = (each_matches("image_pull_secrets", _NAME, f"imagePullSecrets holds a bad name: use {_NAME_ADVICE}"),)


class InferenceService(msgspec.Struct, frozen=True, kw_only=True):
    """An object as far as the operator acts on it. `generation` counts changes of the spec, from 1."""

    name: str
    namespace: str
    spec: InferenceServiceSpec
    uid: str = ""
    generation: int = 1

    # Its children's names, labels and addresses are made of it: `NAME-gateway` must be a DNS label.
    name_rule: ClassVar[Rule] = matches(
        "", r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?",
        "metadata.name becomes a part of DNS names: use at most 50 lower-case letters, digits and '-', a letter first",
    )  # fmt: skip


def parse(document: Mapping[str, Any]) -> InferenceService:
    """The object in `document`, with defaults. Raises ConfigError that names the field and what to write."""
    metadata = document.get("metadata") or {}
    name = metadata.get("name") or ""
    if not InferenceService.name_rule.holds(name):
        raise ConfigError(f"{InferenceService.name_rule.message}; it is {name!r}", field="metadata.name")
    try:
        spec = msgspec.convert(document.get("spec") or {}, InferenceServiceSpec)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        path = f"spec{where.rstrip('`')}"
        raise ConfigError(f"{path}: {message}", field=path) from error
    return InferenceService(
        name=name,
        namespace=metadata.get("namespace") or "default",
        spec=spec,
        uid=metadata.get("uid") or "",
        generation=metadata.get("generation") or 1,
    )

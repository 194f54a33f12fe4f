"""The resource's engines, with the sidecar in each of their pods."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from quire.operator.autoscaling_spec import Autoscaling
from quire.operator.rules import Rule, Spec, matches
from quire.operator.spec_parts import IMAGE, IMAGE_ADVICE, MEMORY, ResourceSpec
from quire.operator.speculation_spec import SpeculationSpec

_OWN_FLAGS = ("listen", "name", "model", "sidecar", "metrics-port", "grace", "log-level", "log-format")
_FIELD_FLAGS = ("max-model-len", "dtype", "kv-cache-bytes", "kv-cache-dtype", "max-num-seqs")
_DRAFT_FLAGS = ("speculation", "num-speculative-tokens", "speculative-model")
_GROUP_FLAGS = ("tensor-parallel-size", "nnodes", "node-rank", "master-addr", "master-port", "rendezvous-timeout")
_TAKEN = f"--({'|'.join((*_OWN_FLAGS, *_FIELD_FLAGS, *_DRAFT_FLAGS, *_GROUP_FLAGS))})(=.*)?"


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
    """The engines that run the model, each with a grammar sidecar."""

    replicas: Annotated[
        int,
        Meta(
            description="How many, or with autoscaling how many to begin with. The scale subresource (kubectl scale) "
            "writes it.",
            ge=0,
            le=1000,
        ),
    ] = 1
    autoscaling: Annotated[
        Autoscaling | None, Meta(description="Left out, there are always as many as replicas says.")
    ] = None
    image: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="Left out, the operator's own.")
    ] = None
    gpus: Annotated[
        int,
        Meta(
            description="NVIDIA GPUs of each engine, on each of its nodes; 0 runs on the CPU. All of them share each "
            "layer (tensor parallelism), so their number in all must divide the model's heads.",
            ge=0,
            le=64,
        ),
    ] = 0
    nodes: Annotated[
        int,
        Meta(
            description="Nodes that each engine spans. More than one needs LeaderWorkerSet in the cluster, and a fast "
            "network.",
            ge=1,
            le=64,
        ),
    ] = 1
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
    kv_dtype: Annotated[
        Literal["auto", "fp8"],
        Meta(description="What keys and values are kept in; fp8 takes half the memory, and a GPU that has it."),
    ] = "auto"
    speculation: Annotated[SpeculationSpec, Meta(description="Drafts, several of which a step may verify.")] = field(
        default_factory=SpeculationSpec
    )
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
        matches("image", IMAGE, f"image is not an image: {IMAGE_ADVICE}"),
        Rule(
            "!has(self.nodes) || self.nodes == 1 || (has(self.gpus) && self.gpus > 0)",
            "nodes is more than 1 without GPUs: set engine.gpus to the number on each node, or raise engine.replicas "
            "instead of engine.nodes",
            lambda engine: engine.nodes == 1 or engine.gpus > 0,
        ),
        Rule(
            "!has(self.kvDtype) || self.kvDtype != 'fp8' || (has(self.gpus) && self.gpus > 0)",
            "kvDtype is fp8, which takes a GPU: set engine.gpus, or leave engine.kvDtype out",
            lambda engine: engine.kv_dtype != "fp8" or engine.gpus > 0,
        ),
        matches(
            "kv_cache", MEMORY, "kvCache is not an amount of memory: write a number with Mi, Gi or Ti, such as 8Gi"
        ),
        Rule(
            "self.all(flag, flag.startsWith('--'))",
            "extraArgs holds an entry that is no flag: write FLAG=VALUE in one entry, such as --max-waiting=64",
            lambda flags: all(flag.startswith("--") for flag in flags),
            "extra_args",
        ),
        Rule(
            f"!self.exists(flag, flag.matches('^{_TAKEN}$'))",
            "extraArgs sets a flag that the operator sets: use maxModelLen, dtype, kvCache, kvDtype or maxNumSeqs for "
            "those, speculation for drafts', gpus and nodes for those of several GPUs, and leave out --listen, --name, "
            "--model, --sidecar, --metrics-port, --grace and the log's",
            lambda flags: not any(matches("", _TAKEN, "").holds(flag) for flag in flags),
            "extra_args",
        ),
        Rule(
            "!self.exists(flag, flag.matches('^--tls-'))",
            "extraArgs sets up TLS, which routers and probes must speak, too: leave it out and name a Secret in "
            "spec.tls.secret",
            lambda flags: not any(flag.startswith("--tls-") for flag in flags),
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

    rules = (matches("image", IMAGE, f"image is not an image: {IMAGE_ADVICE}"),)

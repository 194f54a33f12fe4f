"""The resource, InferenceService: the one source of its CRD (`crd`), of its defaults and of its rules.

Read by `core` and `resources`; `parse` is how a document becomes these types. `model_spec` and `engine_spec` have the
larger parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, field

from quire.operator.engine_spec import EngineSpec, SidecarSpec
from quire.operator.exposure_spec import HttpRouteSpec, IngressSpec, PodMonitorSpec
from quire.operator.model_spec import ModelSpec
from quire.operator.rollout_spec import RolloutSpec
from quire.operator.rules import Rule, Spec, each_matches, matches
from quire.operator.spec_parts import IMAGE, IMAGE_ADVICE, NAME, NAME_ADVICE, ResourceSpec, SecretKey
from quire.service.errors import ConfigError


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
        int,
        Meta(
            description="How long a request waits for an engine when none is ready; where engines scale to zero, "
            "loadSeconds at least.",
            ge=0,
            le=3600,
        ),
    ] = 5
    max_moves: Annotated[
        int,
        Meta(description="How often a request may move to another engine without a token in between.", ge=0, le=100),
    ] = 3

    rules = (matches("image", IMAGE, f"image is not an image: {IMAGE_ADVICE}"),)


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
    ingress: Annotated[IngressSpec | None, Meta(description="Left out, there is none.")] = None
    http_route: Annotated[HttpRouteSpec | None, Meta(description="Left out, there is none.")] = None
    drain_seconds: Annotated[
        int, Meta(description="How long answers in flight may go on when a gateway stops.", ge=0, le=3600)
    ] = 30

    rules = (
        matches("image", IMAGE, f"image is not an image: {IMAGE_ADVICE}"),
        matches("tls_secret", NAME, f"tlsSecret is not a Secret's name: use {NAME_ADVICE}"),
        Rule(
            "!has(self.tlsSecret) || !(has(self.ingress) || has(self.httpRoute))",
            "ingress and httpRoute reach gateways over plain HTTP: leave gateway.tlsSecret out and give the "
            "certificate to ingress.tlsSecret or to the Gateway",
            lambda gateway: gateway.tls_secret is None or not (gateway.ingress or gateway.http_route),
        ),
    )


class TlsSpec(Spec, frozen=True):
    """Encrypted connections of gateways, routers and engines among themselves, each of which shows its certificate."""

    secret: Annotated[
        str,
        Meta(
            description="A Secret with tls.crt, tls.key and ca.crt, as cert-manager makes them, for the DNS name "
            "SERVICE.NAMESPACE.svc. All pods have it, and read it again when it changes.",
            min_length=1,
            max_length=253,
        ),
    ]

    rules = (matches("secret", NAME, f"secret is not a Secret's name: use {NAME_ADVICE}"),)


class ObservabilitySpec(Spec, frozen=True):
    """What the service tells about itself. Every container serves Prometheus metrics in any case."""

    otlp_endpoint: Annotated[
        Annotated[str, Meta(max_length=512)] | None,
        Meta(description="Where spans go over OTLP, such as http://collector:4317; left out, nowhere."),
    ] = None
    pod_monitor: Annotated[PodMonitorSpec | None, Meta(description="Left out, there is none.")] = None
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
    tls: Annotated[
        TlsSpec | None,
        Meta(
            description="Left out, services speak plain text to one another. While this is put in or taken out of a "
            "running service, old pods and new ones don't understand each other."
        ),
    ] = None
    rollout: Annotated[RolloutSpec, Meta(description="How changes reach the engines.")] = field(
        default_factory=RolloutSpec
    )
    observability: Annotated[ObservabilitySpec, Meta(description="Traces and logs.")] = field(
        default_factory=ObservabilitySpec
    )
    image_pull_secrets: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=253)], ...],
        Meta(description="Secrets with which nodes pull the images.", max_length=8),
    ] = ()

    rules = (
        each_matches("image_pull_secrets", NAME, f"imagePullSecrets holds a bad name: use {NAME_ADVICE}"),
        Rule(
            "!has(self.engine) || !has(self.engine.speculation) || !has(self.engine.speculation.head) || "
            "(has(self.model) && (has(self.model.claim) || has(self.model.image)))",
            "engine.speculation.head is a folder beside the model: give model.claim or model.image, or leave it out",
            lambda spec: spec.engine.speculation.head is None or bool(spec.model.claim or spec.model.image),
        ),
    )


@dataclass(frozen=True, slots=True)
class Key:
    """Which service."""

    namespace: str
    name: str


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

    # A group's pods are NAME-engine-999-63, and their StatefulSet's name becomes a label with a hash behind it.
    group_name_rule: ClassVar[Rule] = Rule(
        "self.spec.engine.nodes == 1 || self.metadata.name.size() <= 40",
        "metadata.name has more than 40 characters, too many for engines that span nodes: use a shorter one, or set "
        "engine.nodes to 1",
        lambda service: not service.spans_nodes or len(service.name) <= 40,
    )

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return Key(self.namespace, self.name)

    @property
    def spans_nodes(self) -> bool:
        """Whether an engine is a group of pods."""
        return self.spec.engine.nodes > 1

    @property
    def scales_to_zero(self) -> bool:
        """Whether it may be without engines, and is to answer all the same."""
        autoscaling = self.spec.engine.autoscaling
        return autoscaling is not None and autoscaling.min_replicas == 0

    def scaled(self, replicas: int) -> InferenceService:
        """The same with so many engines."""
        engine = msgspec.structs.replace(self.spec.engine, replicas=replicas)
        return msgspec.structs.replace(self, spec=msgspec.structs.replace(self.spec, engine=engine))


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
    service = InferenceService(
        name=name,
        namespace=metadata.get("namespace") or "default",
        spec=spec,
        uid=metadata.get("uid") or "",
        generation=metadata.get("generation") or 1,
    )
    if not InferenceService.group_name_rule.holds(service):
        raise ConfigError(f"{InferenceService.group_name_rule.message}; it is {name!r}", field="spec.engine.nodes")
    return service

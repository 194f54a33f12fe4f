"""The resource's ways in from outside of the cluster: an Ingress or a route of the Gateway API."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from quire.operator.rules import Spec, each_matches, matches
from quire.operator.spec_parts import NAME, NAME_ADVICE

_HOST = r"(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_HOST_ADVICE = "write a DNS name, such as llm.example or *.example"

_Name = Annotated[str, Meta(min_length=1, max_length=253)]


class IngressSpec(Spec, frozen=True):
    """An Ingress that leads to the gateways. Answers stream: its controller must neither buffer nor cut them."""

    host: Annotated[str, Meta(description="The name that clients ask for.", min_length=1, max_length=253)]
    class_name: Annotated[_Name | None, Meta(description="The IngressClass; left out, the cluster's default.")] = None
    tls_secret: Annotated[
        _Name | None, Meta(description="A Secret with the host's certificate; left out, the Ingress is plain HTTP.")
    ] = None
    annotations: Annotated[
        dict[str, Annotated[str, Meta(max_length=1024)]],
        Meta(description="For its controller, such as timeouts.", max_length=16),
    ] = field(default_factory=dict)

    rules = (
        matches("host", _HOST, f"host is not a host: {_HOST_ADVICE}"),
        matches("class_name", NAME, f"className is not a class's name: use {NAME_ADVICE}"),
        matches("tls_secret", NAME, f"tlsSecret is not a Secret's name: use {NAME_ADVICE}"),
    )


class ParentGateway(Spec, frozen=True):
    """A Gateway of the Gateway API, which the cluster has."""

    name: Annotated[str, Meta(description="The Gateway.", min_length=1, max_length=253)]
    namespace: Annotated[
        Annotated[str, Meta(min_length=1, max_length=63)] | None, Meta(description="Left out, the service's own.")
    ] = None
    section: Annotated[_Name | None, Meta(description="One of its listeners; left out, all.")] = None

    rules = (
        matches("name", NAME, f"name is not a Gateway's name: use {NAME_ADVICE}"),
        matches("namespace", NAME, f"namespace is not a namespace's name: use {NAME_ADVICE}"),
        matches("section", NAME, f"section is not a listener's name: use {NAME_ADVICE}"),
    )


class HttpRouteSpec(Spec, frozen=True):
    """An HTTPRoute that leads to the gateways. The cluster needs the Gateway API."""

    gateways: Annotated[
        tuple[ParentGateway, ...], Meta(description="Through which Gateways.", min_length=1, max_length=8)
    ]
    hostnames: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=253)], ...],
        Meta(description="Names that clients ask for; empty is all that the Gateways take.", max_length=16),
    ] = ()

    rules = (each_matches("hostnames", _HOST, f"hostnames holds what is no host: {_HOST_ADVICE}"),)


class PodMonitorSpec(Spec, frozen=True):
    """A PodMonitor for all pods of the service. The cluster needs the Prometheus operator."""

    interval_seconds: Annotated[int, Meta(description="Between two scrapes.", ge=1, le=3600)] = 30
    labels: Annotated[
        dict[str, Annotated[str, Meta(max_length=63)]],
        Meta(description="By which a Prometheus finds it, such as release: prometheus.", max_length=8),
    ] = field(default_factory=dict)

"""What is in the cluster, as `core` sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quire.operator import names
from quire.operator.resources.group import KIND
from quire.operator.resources.metadata import Component, Manifest, child_name
from quire.operator.spec import InferenceService


@dataclass(frozen=True, slots=True)
class Refusal:
    """A child that the API server would not take, in its words. `is_unknown`: it has no such kind."""

    kind: str
    name: str
    message: str
    is_unknown: bool = False


@dataclass(frozen=True, slots=True)
class References:
    """Objects of others that a service names: they must be there, and the operator only looks."""

    secrets: frozenset[str] = frozenset()
    claims: frozenset[str] = frozenset()


def references(service: InferenceService) -> References:
    """What `service` names."""
    spec = service.spec
    secrets = set(spec.image_pull_secrets)
    if spec.model.hub and spec.model.hub.token_secret:
        secrets.add(spec.model.hub.token_secret.name)
    if spec.gateway.api_keys:
        secrets.add(spec.gateway.api_keys.name)
    if spec.gateway.tls_secret:
        secrets.add(spec.gateway.tls_secret)
    if spec.tls:
        secrets.add(spec.tls.secret)
    if spec.gateway.ingress and spec.gateway.ingress.tls_secret:
        secrets.add(spec.gateway.ingress.tls_secret)
    claims = {spec.model.claim.name} if spec.model.claim else set()
    return References(frozenset(secrets), frozenset(claims))


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at a service's surroundings.

    `children` have the service's label; `secrets` maps each Secret that is there to its entries' names, and `claims`
    are those that are there.
    """

    children: tuple[Manifest, ...] = ()
    pods: tuple[Manifest, ...] = ()
    secrets: Mapping[str, frozenset[str]] = field(default_factory=dict)
    claims: frozenset[str] = frozenset()

    def child(self, kind: str, name: str) -> Manifest | None:
        """The child of that kind and name."""
        return next((each for each in self.children if key_of(each) == (kind, name)), None)

    def pods_of(self, component: Component) -> tuple[Manifest, ...]:
        """The component's pods that are not on their way out."""
        return tuple(
            pod
            for pod in self.pods
            if pod["metadata"]["labels"].get(names.COMPONENT) == component.value
            and not pod["metadata"].get("deletionTimestamp")
        )

    def deployment(self, service: InferenceService, component: Component) -> Manifest | None:
        """The component's Deployment."""
        return self.child("Deployment", child_name(service, component))

    def engines(self, service: InferenceService, component: Component = Component.ENGINE) -> tuple[Manifest, ...]:
        """What makes the engines' pods: of the kind that the service wants, and of the other while it is replaced."""
        kinds = (KIND, "Deployment") if service.spans_nodes else ("Deployment", KIND)
        found = (self.child(kind, child_name(service, component)) for kind in kinds)
        return tuple(each for each in found if each is not None)


def key_of(manifest: Manifest) -> tuple[str, str]:
    """What tells the children of a service apart."""
    return manifest["kind"], manifest["metadata"]["name"]

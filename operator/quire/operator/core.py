"""What should be, from what a service asks for and what there is. Pure: no clock, no cluster.

`handlers` calls these for each look at a service: `changes` says what to write, `status.status_of` what to tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.operator.config import Images
from quire.operator.drift import covers, stamped
from quire.operator.engine_pods import still_serving
from quire.operator.observed import Observed, key_of
from quire.operator.resources.accounts import accounts
from quire.operator.resources.cache import cache
from quire.operator.resources.disruption import budgets
from quire.operator.resources.engine import CanaryEngines, canary, engine
from quire.operator.resources.environment import environment
from quire.operator.resources.exposure import exposure
from quire.operator.resources.gateway import gateway
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.resources.monitor import monitors
from quire.operator.resources.network import engine_policies, policies
from quire.operator.resources.router import router
from quire.operator.resources.services import canary_service, services
from quire.operator.spec import InferenceService


@dataclass(frozen=True, slots=True)
class Changes:
    """Children to apply, in order, and children that are no longer wanted."""

    apply: tuple[Manifest, ...]
    delete: tuple[Manifest, ...]


def children(service: InferenceService, images: Images, on_trial: CanaryEngines | None = None) -> list[Manifest]:
    """Everything that the service becomes, with engines on trial beside it; what others refer to comes first."""
    return [
        stamped(each)
        for each in (
            *accounts(service),
            environment(service),
            *cache(service),
            *policies(service),
            *services(service),
            *budgets(service),
            engine(service, images),
            router(service, images),
            gateway(service, images),
            *exposure(service),
            *monitors(service),
            *(_of_canary(on_trial, images) if on_trial else ()),
        )
    ]


def changes(
    service: InferenceService, observed: Observed, images: Images, on_trial: CanaryEngines | None = None
) -> Changes:
    """What to write so that the cluster is as the service asks; nothing where it is so already."""
    wanted = children(service, images, on_trial)
    keys = {key_of(each) for each in wanted}
    if serving := still_serving(service, observed):
        keys.add(key_of(serving))
    return Changes(
        apply=tuple(each for each in wanted if not _is_so(observed.child(*key_of(each)), each)),
        delete=tuple(each for each in observed.children if key_of(each) not in keys and _may_go(each, service)),
    )


def _of_canary(engines: CanaryEngines, images: Images) -> list[Manifest]:
    return [
        *engine_policies(engines.service, Component.CANARY),
        canary_service(engines),
        canary(engines, images),
    ]


def _is_so(live: Manifest | None, desired: Manifest) -> bool:
    return live is not None and covers(live, desired)


def _may_go(live: Manifest, service: InferenceService) -> bool:
    """Whether it is the service's own and not on its way out already."""
    metadata = live["metadata"]
    is_own = any(owner.get("uid") == service.uid for owner in metadata.get("ownerReferences", ()))
    return is_own and not metadata.get("deletionTimestamp")

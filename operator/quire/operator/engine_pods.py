"""What there is of a service's engines, whichever kind makes their pods. Pure.

When engines come to span nodes, or no longer do, another kind makes them. The old one serves until the new one does.
"""

from __future__ import annotations

from quire.operator.observed import Observed
from quire.operator.pod_counts import PodCounts
from quire.operator.resources.group import KIND
from quire.operator.resources.metadata import Component, Manifest
from quire.operator.spec import InferenceService


def engine_counts(service: InferenceService, observed: Observed) -> PodCounts:
    """All engines, those that are being replaced included."""
    pods, wanted = observed.pods_of(Component.ENGINE), service.spec.engine.replicas
    own, other = _both(service, observed)
    found = PodCounts.of(own, wanted, pods)
    return found.plus(PodCounts.of(other, 0, pods)) if other else found


def still_serving(service: InferenceService, observed: Observed) -> Manifest | None:
    """The engines of the other kind, if they must stay until those of the wanted one are ready.

    Without surge there is no room for both.
    """
    own, other = _both(service, observed)
    is_replaced = PodCounts.of(own, service.spec.engine.replicas, observed.pods_of(Component.ENGINE)).is_settled
    return other if service.spec.engine.surge and not is_replaced else None


def _both(service: InferenceService, observed: Observed) -> tuple[Manifest | None, Manifest | None]:
    """What makes the engines as the service wants them, and what makes those that go."""
    by_kind = {each["kind"] == KIND: each for each in observed.engines(service)}
    return by_kind.get(service.spans_nodes), by_kind.get(not service.spans_nodes)

"""One look at one service: see what there is, write what differs, tell how it is.

What there is stands in the `store`, which the watches keep; only Secrets and claims of others are asked for. `queue`
decides when to look.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from quire.operator import names
from quire.operator.cluster import ApiException, Cluster
from quire.operator.config import OperatorConfig
from quire.operator.core import changes
from quire.operator.deletion_cost import priced
from quire.operator.events import events
from quire.operator.kinds import CHILD_OF, CLAIM, EVENT, OPTIONAL, POD, SECRET, SERVICE
from quire.operator.observed import Observed, Refusal, key_of, references
from quire.operator.resources.engine import CanaryEngines
from quire.operator.resources.metadata import Manifest
from quire.operator.rollout import rollout_of
from quire.operator.scaler import Follow, unscaled
from quire.operator.spec import InferenceService, Key, parse
from quire.operator.status import invalid_status, plain, status_of
from quire.operator.status_types import Status
from quire.operator.store import Store
from quire.operator.strangers import Strangers
from quire.service.errors import ConfigError

logger = logging.getLogger(__name__)

# Answers that stay the same until somebody changes something.
_REFUSED = frozenset({400, 403, 404, 422})


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Reconciler:
    """Makes services true. Raises ApiException and aiohttp's errors where another try may help.

    `follow` says how many engines a service should have (see `scaler`); nobody else writes their number.
    """

    def __init__(
        self,
        cluster: Cluster,
        store: Store,
        config: OperatorConfig,
        follow: Follow = unscaled,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._strangers = Strangers(cluster, store)
        self._config = config
        self._follow = follow
        self._now = now
        # Services that are being looked at, of which others' news came with the answers to writes.
        self._stale: set[Key] = set()

    async def reconcile(self, key: Key) -> float | None:
        """Returns after how many seconds to look again; None: when something changes."""
        try:
            wait = await self._look(key)
            return 0.0 if key in self._stale else wait
        finally:
            self._stale.discard(key)

    async def _look(self, key: Key) -> float | None:
        document = self._store.service(key)
        if document is None or document["metadata"].get("deletionTimestamp"):
            # The garbage collector takes what it owns.
            return None
        previous = document.get("status") or {}
        try:
            service = parse(document)
        except ConfigError as error:
            generation = document["metadata"]["generation"]
            status = invalid_status(error.message, generation, previous, self._now())
            await self._tell(key, previous, status)
            return None
        return await self._keep(service, previous)

    async def _keep(self, service: InferenceService, previous: Manifest) -> float | None:
        """Makes the service true whose status is `previous`."""
        observed = await self._observe(service)
        scale = self._follow(service, observed, previous)
        rollout = rollout_of(
            service.scaled(scale.replicas),
            observed,
            self._config.images,
            previous=previous,
            trial=scale.trial,
            now=self._now(),
        )
        service = rollout.service
        for pod in priced(service, observed, scale.costs):
            await self._price(pod)
        refusals = await self._write(service, observed, rollout.canary)
        # What was just asked for has not happened yet, and the status must not say that it has.
        observed = replace(observed, children=self._store.children(service.key))
        status = status_of(
            service,
            observed,
            refusals=refusals,
            load=scale.load,
            rollout=rollout.state,
            previous=previous,
            now=self._now(),
        )
        # Events go first: once the status is written, its transitions are none any more.
        for event in events(service, previous, status, self._now(), self._config.identity):
            await self._announce(event)
        await self._tell(service.key, previous, status)
        wanted = references(service)
        is_waiting = refusals or any(
            condition.type == "Degraded" and condition.status == "True" for condition in status.conditions
        )
        if is_waiting and (refusals or wanted.secrets or wanted.claims):
            # Something that nobody tells of may have been put right: a Secret, a quota.
            return min(self._config.look_again, rollout.look_again or self._config.look_again)
        return rollout.look_again

    async def _observe(self, service: InferenceService) -> Observed:
        wanted = references(service)
        secrets = {name: await self._cluster.get(SECRET, service.namespace, name) for name in sorted(wanted.secrets)}
        claims = {name: await self._cluster.get(CLAIM, service.namespace, name) for name in sorted(wanted.claims)}
        return Observed(
            children=self._store.children(service.key),
            pods=self._store.pods(service.key),
            secrets={name: frozenset(each.get("data") or ()) for name, each in secrets.items() if each is not None},
            claims=frozenset(name for name, each in claims.items() if each is not None),
        )

    async def _write(
        self, service: InferenceService, observed: Observed, on_trial: CanaryEngines | None
    ) -> list[Refusal]:
        refusals = []
        found = changes(service, observed, self._config.images, on_trial)
        for child in found.apply:
            try:
                await self._apply(service, observed, child)
            except ApiException as error:
                if error.status not in _REFUSED:
                    raise
                is_unknown = error.status == 404 and CHILD_OF[child["kind"]] in OPTIONAL
                refusals.append(Refusal(*key_of(child), error.reason, is_unknown))
        for child in found.delete:
            await self._cluster.delete(CHILD_OF[child["kind"]], child)
            self._store.remove(CHILD_OF[child["kind"]], child)
        if found.apply or found.delete:
            counts = {"applied": len(found.apply), "deleted": len(found.delete), "refused": len(refusals)}
            logger.info("wrote", extra={"service": f"{service.namespace}/{service.name}", **counts})
        return refusals

    async def _apply(self, service: InferenceService, observed: Observed, child: Manifest) -> None:
        kind = CHILD_OF[child["kind"]]
        is_new = observed.child(*key_of(child)) is None
        if is_new and await self._strangers.are_in_the_way(service, kind, child):
            raise ApiException(
                status=422,
                reason="one of this name is there already and not the service's: delete it, or rename the service",
            )
        if self._store.written(kind, await self._cluster.apply(kind, child)):
            self._stale.add(service.key)

    async def _price(self, pod: Manifest) -> None:
        try:
            await self._cluster.apply(POD, pod)
        except ApiException as error:
            if error.status not in _REFUSED | {409}:
                raise
            # It is gone, or its owner's business: then the ReplicaSet chooses as it ever does.
            logger.info("can't say what a pod's end costs: %s", error.reason)

    async def _announce(self, event: Manifest) -> None:
        try:
            await self._cluster.create(EVENT, event)
        except ApiException as error:
            if error.status == 409:
                return
            if error.status not in _REFUSED:
                raise
            # Such as in a namespace that is being deleted. The status says the same.
            logger.warning("can't write an event: %s", error.reason)

    async def _tell(self, key: Key, previous: Manifest, status: Status) -> None:
        """Writes the status if it differs."""
        wanted = plain(status)
        if wanted == previous:
            return
        manifest = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": key.name, "namespace": key.namespace},
            "status": wanted,
        }
        try:
            if self._store.written(SERVICE, await self._cluster.apply(SERVICE, manifest, subresource="status")):
                self._stale.add(key)
        except ApiException as error:
            # Deleted meanwhile.
            if error.status != 404:
                raise

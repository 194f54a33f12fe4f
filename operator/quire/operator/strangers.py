"""Objects that are in the way: of a child's kind and name, and somebody else's.

Server-side apply would take them over. They have no label of the operator's, so no watch tells of them; one list of a
namespace serves all services in it that come at the same time.
"""

from __future__ import annotations

import asyncio

from quire.operator import names
from quire.operator.cluster import Cluster
from quire.operator.kinds import Kind
from quire.operator.resources.metadata import Manifest
from quire.operator.spec import InferenceService
from quire.operator.store import Store

_UNLABELLED = f"{names.MANAGED_BY}!={names.FIELD_MANAGER}"
# What somebody makes in this time under a child's very name is taken over.
_FRESH_SECONDS = 2.0


class Strangers:
    """Asked before a child is made."""

    def __init__(self, cluster: Cluster, store: Store) -> None:
        self._cluster = cluster
        self._store = store
        self._lists: dict[tuple[Kind, str], tuple[float, asyncio.Task[dict[str, Manifest]]]] = {}

    async def are_in_the_way(self, service: InferenceService, kind: Kind, child: Manifest) -> bool:
        """Whether one has the child's name. Raises ApiException and aiohttp's errors."""
        name = child["metadata"]["name"]
        there = self._store.find(kind, service.namespace, name)
        if there is None:
            there = (await self._list(kind, service.namespace)).get(name)
        return there is not None and not _belongs_to(there, service)

    async def _list(self, kind: Kind, namespace: str) -> dict[str, Manifest]:
        now = asyncio.get_running_loop().time()
        self._lists = {each: (until, task) for each, (until, task) in self._lists.items() if until > now}
        if (kind, namespace) not in self._lists:
            task = asyncio.create_task(self._ask(kind, namespace))
            self._lists[kind, namespace] = (now + _FRESH_SECONDS, task)
        _, task = self._lists[kind, namespace]
        # Who waits for it may be cancelled; others wait, too.
        return await asyncio.shield(task)

    async def _ask(self, kind: Kind, namespace: str) -> dict[str, Manifest]:
        found = await self._cluster.list_metadata(kind, namespace, _UNLABELLED)
        return {each["metadata"]["name"]: each for each in found}


def _belongs_to(there: Manifest, service: InferenceService) -> bool:
    return any(
        owner["kind"] == names.KIND and owner["name"] == service.name
        for owner in there["metadata"].get("ownerReferences", ())
    )

"""A link to every engine that discovery finds, for as long as it is found and still has something in flight.

`service.RouterService` runs it beside the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from quire.router.core import Router
from quire.router.discovery import Addresses, Discovery
from quire.router.endpoint import Endpoint
from quire.router.link import EngineLink
from quire.router.metrics import RouterMetrics

logger = logging.getLogger(__name__)


class EngineLinks:
    """Follows `discovery`; `link_to` makes the link of an engine that is new."""

    def __init__(
        self, discovery: Discovery, router: Router, metrics: RouterMetrics, link_to: Callable[[Endpoint], EngineLink]
    ) -> None:
        self._discovery = discovery
        self._router = router
        self._metrics = metrics
        self._link_to = link_to
        self._endpoints: dict[str, Endpoint] = {}
        self._found: Addresses = {}

    async def run(self) -> None:
        """Keeps every engine connected until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            async for addresses in self._discovery.addresses():
                self._follow(addresses, tasks)

    def _follow(self, addresses: Addresses, tasks: asyncio.TaskGroup) -> None:
        self._found = addresses
        for address, endpoint in self._endpoints.items():
            if address in addresses and endpoint.withdrawn:
                self._router.restore_engine(endpoint)
        for address in sorted(addresses.keys() - self._endpoints.keys()):
            endpoint = self._endpoints[address] = self._router.add_engine(address)
            tasks.create_task(self._keep(endpoint), name=f"engine {address}")
        for address, canary in addresses.items():
            self._endpoints[address].canary = canary
        self.settle()

    def settle(self) -> None:
        """Withdraws engines that are not found any more; to be called when any engine may have changed, too.

        The last ones that take requests stay until one of those found does: a successor is ready before its session
        stands, and between the two there would be none.
        """
        found = [endpoint for address, endpoint in self._endpoints.items() if address in self._found]
        is_waited_for = bool(found) and not any(endpoint.routable for endpoint in found)
        for address, endpoint in self._endpoints.items():
            if address in self._found or endpoint.withdrawn or (endpoint.routable and is_waited_for):
                continue
            logger.info("engine withdrawn", extra={"engine": endpoint.name, "in_flight": len(endpoint.flights)})
            self._router.withdraw_engine(endpoint)

    async def _keep(self, endpoint: Endpoint) -> None:
        while not endpoint.withdrawn:
            link = asyncio.create_task(self._link_to(endpoint).run(), name=f"link {endpoint.address}")
            unused = asyncio.create_task(endpoint.unused.wait())
            try:
                await asyncio.wait((link, unused), return_when=asyncio.FIRST_COMPLETED)
            finally:
                unused.cancel()
                link.cancel()
                # A link that ended by itself has failed: then this raises why.
                await asyncio.wait((link, unused))
            if not link.cancelled():
                link.result()
            # It may have got a request since, or have been found again.
            self._router.engine_lost(endpoint, "it is not among the router's engines any more")
        del self._endpoints[endpoint.address]
        self._router.remove_engine(endpoint)
        self._metrics.forget(endpoint)
        for _ in self._router.fleet.index.sweep():
            await asyncio.sleep(0)

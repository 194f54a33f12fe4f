"""Engines by a name in DNS that has an address for each of them, as that of a headless Service in Kubernetes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from quire.router.discovery import Addresses

Resolve = Callable[[str, int], Awaitable[frozenset[str]]]

logger = logging.getLogger(__name__)


async def resolve(host: str, port: int) -> frozenset[str]:
    """The name's addresses as the system finds them, with the port; raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset(
        f"[{where[0]}]:{port}" if family is socket.AF_INET6 else f"{where[0]}:{port}"
        for family, _, _, _, where in found
    )


class DnsNames:
    """Looks the name up every `interval` seconds.

    A name that can't be found costs no engine: a name server has its faults, and a Service all of whose pods fail
    their probes has no addresses either. Engines that are really gone have no session, so nothing goes to them.
    """

    def __init__(self, host: str, port: int, *, interval: float, resolve: Resolve = resolve) -> None:
        self._host = host
        self._port = port
        self._interval = interval
        self._resolve = resolve

    async def addresses(self) -> AsyncIterator[Addresses]:
        """What the name means, whenever that has changed."""
        known: frozenset[str] | None = None
        failure = ""
        while True:
            try:
                found = await self._resolve(self._host, self._port)
            except OSError as error:
                if str(error) != failure:
                    failure = str(error)
                    logger.warning("can't resolve the engines' name: %s", failure, extra={"host": self._host})
            else:
                failure = ""
                if found != known:
                    known = found
                    yield dict.fromkeys(found)
            await asyncio.sleep(self._interval)

"""Engines by a list of addresses that never changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from quire.router.discovery import Addresses


class StaticAddresses:
    """These and no others."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses: Addresses = dict.fromkeys(addresses)

    async def addresses(self) -> AsyncIterator[Addresses]:
        """All of them, once."""
        yield self._addresses

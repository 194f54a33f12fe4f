"""Engines by a list of addresses that never changes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable


class StaticAddresses:
    """These and no others."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = frozenset(addresses)

    async def addresses(self) -> AsyncIterator[frozenset[str]]:
        """All of them, once."""
        yield self._addresses

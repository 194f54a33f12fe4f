"""A transport whose small writes go out together: an answer's head and its first event, its last event and its end.

uvloop makes a system call of each write, and each may wake up the client.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Gathered:
    """`transport`, whose writes of one turn of the event loop are one. All else is the transport's own."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends `data` at the end of this turn, after what was written before."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Closes once all is sent."""
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        """In bytes, with what has not been passed on."""
        return sum(map(len, self._parts)) + self._transport.get_write_buffer_size()

    def _flush(self) -> None:
        if self._parts:
            parts, self._parts = self._parts, []
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

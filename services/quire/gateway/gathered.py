"""A transport whose small writes go out together: an answer's head and its first event, its last event and its end.

uvloop makes a system call of each write, and each may wake up the client.
"""

from __future__ import annotations

import asyncio
from typing import Any


class Gathered:
    """`transport`, whose writes of one turn of the event loop are one. All else is the transport's own.

    `written` counts the bytes that it was given.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self.written = 0

    def write(self, data: bytes) -> None:
        """Sends `data` at the end of this turn, after what was written before."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def close(self) -> None:
        """Closes once all is sent."""
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Sends what was written in this turn."""
        if self._parts:
            data, self._parts = b"".join(self._parts), []
            self.written += len(data)
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

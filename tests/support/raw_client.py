"""An HTTP client on a bare socket, for what no library would do: to send half a request, or to stop reading."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit


class RawClient:
    """One connection. It reads what `rest` asks for, and hardly a byte before that."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, url: str, context: ssl.SSLContext | None = None) -> RawClient:
        """Over TLS if there is a `context`."""
        # A small window, so that what the kernel takes for a reader that has stopped is little.
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        address = urlsplit(url)
        await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
        name = None if context is None else address.hostname
        return cls(*await asyncio.open_connection(sock=connection, limit=2048, ssl=context, server_hostname=name))

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def post(self, body: dict[str, Any], **headers: str) -> None:
        """A completion."""
        raw = json.dumps(body).encode()
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{extra}content-length: {len(raw)}\r\n\r\n"
        await self.send(head.encode() + raw)

    async def read(self, most: int) -> bytes:
        """Some of what has come; nothing once the other side has closed."""
        return await asyncio.wait_for(self._reader.read(most), 10)

    async def rest(self) -> bytes:
        """All that comes until the other side closes."""
        try:
            return await asyncio.wait_for(self._reader.read(-1), 10)
        except ConnectionResetError:
            return b""

    async def status(self) -> int:
        """Of the only answer."""
        answer = await self.rest()
        return int(answer.split(b" ", 2)[1]) if answer else 0

    def abort(self) -> None:
        """Hangs up."""
        self._writer.transport.abort()
